"""A training job of a stage: where it starts, what it leaves, and which model the artifact then holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from allo_ray.config.train import TrainConfig
from allo_ray.stages.base import Context, Stage
from allo_ray.train.driver import alone, train
from allo_ray.train.job import DELTA, TrainJob


def fit(
    ctx: Context,
    stage: Stage,
    config: TrainConfig,
    loss: str,
    args: dict[str, Any],
    rows: Path,
    selection: str | None = None,
    own_reference: bool = True,
    logprobs: bool = False,
) -> None:
    """Trains from the model of the input `start`; `selection` names the input with the neurons (None: all).

    `own_reference`: the rows' reference log-probs are those of that model. `logprobs`: the trained model gives the
    log-probs of all pairs too, before it leaves the memory (the next stage's reference, without another start-up).
    """
    start = ctx.model("start")
    here = start.here
    job = TrainJob(
        base=here.base,
        layers=here.layers,
        selection=str(ctx.file(selection, "selection.safetensors")) if selection else None,
        rows=str(rows),
        loss=loss,
        loss_args=args,
        config=TrainConfig(**{name: getattr(config, name) for name in TrainConfig.model_fields}),
        trainer=ctx.config.trainer,
        out=str(ctx.out),
        seed=ctx.settings["seed"],
        own_reference=own_reference,
        pairs=str(ctx.file("pairs", "pairs.parquet")) if logprobs else None,
    )
    result = train(job, ctx.progress, ctx.record, ctx.desk.fit if ctx.desk else alone)
    ctx.startup_seconds, ctx.waited_seconds = result.spent
    ctx.facts.update(result.facts)
    if logprobs:
        ctx.facts["logprobs"] = {"pairs": ctx.inputs["pairs"].key, "dtype": config.dtype}
    ctx.hand_on(start.base, start.masters, (*start.deltas, ctx.published(stage, DELTA)))
