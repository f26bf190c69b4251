"""The teacher rewrites negatives with the fewest edits (paper 4.2); what fails the verifier is dropped and counted."""

from __future__ import annotations

from allo_ray.config.data import VerifyConfig
from allo_ray.config.engine import TeacherConfig
from allo_ray.config.model import ModelConfig
from allo_ray.data.rewrite import rewrite_pairs
from allo_ray.data.teachers import ArithmeticTeacher, EndpointTeacher, ModelTeacher, Teacher
from allo_ray.data.tokenise import Tokeniser
from allo_ray.models import resolve
from allo_ray.stages.base import Context, Stage
from allo_ray.store import local_path


def run(ctx: Context) -> None:
    """Writes rewrites.parquet, tokenised for the reward model (the input `model` is what it starts from)."""
    verify = VerifyConfig(**ctx.settings["verify"])
    ctx.facts["counts"] = rewrite_pairs(
        ctx.out / "rewrites.parquet",
        pairs=ctx.file("pairs", "pairs.parquet"),
        teacher=_teacher(ctx, verify.marker),
        verify=verify,
        reward=Tokeniser(str(local_path(ctx.model("model").base))),
        progress=ctx.progress,
    )


def _teacher(ctx: Context, marker: str) -> Teacher:
    config = ctx.config.rewrite
    assert isinstance(config, TeacherConfig)
    if config.kind == "arithmetic":
        return ArithmeticTeacher(marker)
    if config.kind == "endpoint":
        return EndpointTeacher(config)
    assert config.model is not None
    folder = str(resolve(ModelConfig(path=config.model), ctx.out / "teacher"))
    return ModelTeacher(folder, Tokeniser(folder), ctx.config.engine, config.sampling, ctx.out / "answers")


REWRITE = Stage("rewrite", 1, run)
