"""Per-token log-probs of all pairs under the model that a stage starts from, by the training forward itself."""

from __future__ import annotations

import shutil

from allo_ray.stages.base import Context, Stage
from allo_ray.train.job import LOGPROBS
from allo_ray.train.logprobs import compute_logprobs


def run(ctx: Context) -> None:
    """Writes the table `logprobs/`: computes it, or takes what the training of that model recorded."""
    wanted = {"pairs": ctx.inputs["pairs"].key, "dtype": ctx.settings["dtype"]}
    if ctx.inputs["start"].facts.get("logprobs") == wanted:
        shutil.copytree(ctx.file("start", LOGPROBS), ctx.out / LOGPROBS, dirs_exist_ok=True)
        return
    start = ctx.model("start").here
    result = compute_logprobs(
        base=start.base,
        layers=start.layers,
        pairs=ctx.file("pairs", "pairs.parquet"),
        out=ctx.out / LOGPROBS,
        dtype=ctx.settings["dtype"],
        trainer=ctx.config.trainer,
        progress=ctx.progress,
    )
    ctx.facts.update(result.facts)
    ctx.startup_seconds = result.startup_seconds


REFERENCE = Stage("reference", 1, run)
