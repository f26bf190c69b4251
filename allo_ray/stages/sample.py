"""Samples n responses to every prompt (paper's code: n = 10) with engine actors."""

from __future__ import annotations

from allo_ray.config.engine import SampleConfig
from allo_ray.data.inference import sample
from allo_ray.engines.base import Sampling
from allo_ray.stages.base import Context, Stage


def run(ctx: Context) -> None:
    """Writes the table `samples/`. Verdicts come later, so that another verifier samples nothing again."""
    config = SampleConfig(**ctx.settings["sample"])
    facts = sample(
        ctx.file("prompts", "prompts.parquet"),
        ctx.model("model").here.base,
        ctx.config.engine,
        Sampling(config.temperature, config.top_p, config.max_tokens, config.stop),
        config.n,
        str(ctx.out / "samples"),
        seed=ctx.settings["seed"],
        model_id=ctx.inputs["model"].key,
        progress=ctx.progress,
    )
    ctx.startup_seconds = facts["startup_seconds"]
    ctx.facts.update(engine=facts, counts={name: facts[name] for name in ("rows", "rejected", "killed")})


SAMPLE = Stage("sample", 1, run)
