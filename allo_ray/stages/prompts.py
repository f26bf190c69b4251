"""Takes prompts in: checked, rendered with the template, tokenised; what the rules dropped is listed."""

from __future__ import annotations

from allo_ray.config.data import DataConfig, VerifyConfig
from allo_ray.data.prepare import DROPPED_ROWS, prepare_prompts
from allo_ray.data.tokenise import Tokeniser
from allo_ray.stages.base import Context, Stage, data_settings
from allo_ray.store import local_path


def run(ctx: Context) -> None:
    """Writes prompts.parquet and drops.parquet."""
    counts = prepare_prompts(
        DataConfig(**data_settings(ctx.settings)),
        Tokeniser(str(local_path(ctx.model("model").base))),
        ctx.out / "prompts.parquet",
        ctx.out / "drops.parquet",
        verify=VerifyConfig(**ctx.settings["verify"]),
    )
    ctx.facts["counts"] = counts
    ctx.dropped(counts, DROPPED_ROWS)


PROMPTS = Stage("prompts", 1, run)
