"""Takes the start model in: a folder stays where it is, everything else is written into the artifact."""

from __future__ import annotations

from allo_ray.config.model import ModelConfig
from allo_ray.models import fingerprint, parameter_count, resolve
from allo_ray.stages.base import Context, Stage


def run(ctx: Context) -> None:
    """Facts: `neurons` (values stored in its weights) and the weights' fingerprint."""
    settings = {key: value for key, value in ctx.settings["model"].items() if key != "content"}
    folder = resolve(ModelConfig(**settings), ctx.out / "model")
    ctx.facts.update(neurons=parameter_count(folder), fingerprint=fingerprint(folder))
    inside = folder.is_relative_to(ctx.out)
    ctx.hand_on(ctx.published(MODEL, "model") if inside else str(folder.resolve()), None, ())


MODEL = Stage("model", 1, run)
