"""The supervised stages: the backbone's short SFT, and the reward model that learns to write corrections."""

from __future__ import annotations

from dataclasses import replace

from allo_ray.config.train import RewardConfig, SftConfig, TrainConfig
from allo_ray.data.reward_rows import write_prompt_sequences, write_reward_sequences
from allo_ray.data.tokenise import Tokeniser
from allo_ray.data.train_rows import build_sequence_rows
from allo_ray.models import fingerprint
from allo_ray.neurons import delta
from allo_ray.neurons.export import export
from allo_ray.stages.base import Context, Stage
from allo_ray.stages.training import fit
from allo_ray.store import local_path
from allo_ray.train.job import DELTA


def sft(ctx: Context) -> None:
    """One epoch on (prompt, reference). The result is the backbone: masters in float32, and a folder model/ in bf16."""
    sequences = ctx.out / "sequences.parquet"
    ctx.facts["counts"] = write_prompt_sequences(
        sequences,
        prompts=ctx.file("prompts", "prompts.parquet"),
        tokeniser=Tokeniser(str(local_path(ctx.model("start").base))),
        max_tokens=ctx.settings["max_tokens"],
    )
    _train(ctx, SFT, SftConfig(**ctx.settings["train"]))


def reward(ctx: Context) -> None:
    """Learns the teacher's corrections given problem, correct solution and prediction (paper 4.2)."""
    config = RewardConfig(**ctx.settings["train"])
    ctx.facts["counts"] = write_reward_sequences(
        ctx.out / "sequences.parquet",
        rewrites=ctx.file("rewrites", "rewrites.parquet"),
        max_tokens=ctx.settings["max_tokens"],
        limit=config.limit,
    )
    _train(ctx, REWARD, config)


def _train(ctx: Context, stage: Stage, config: TrainConfig) -> None:
    """Trains all neurons, and makes the result the base of what follows: a bf16 folder, its masters beside."""
    rows = ctx.out / "rows.parquet"
    if not rows.exists():  # a resumed attempt reads the rows it began with
        sequences = ctx.out / "sequences.parquet"
        build_sequence_rows(rows, sequences=sequences, epochs=config.epochs, seed=ctx.settings["seed"])
    fit(ctx, stage, config, "sft", {}, rows)
    start = ctx.model("start")
    folder = ctx.out / "model"
    export(local_path(start.base), [*map(local_path, start.deltas), ctx.out / DELTA], folder)
    replace(delta.load(ctx.out / DELTA), base=fingerprint(folder)).save(ctx.out / MASTERS)
    (ctx.out / DELTA).unlink()
    ctx.hand_on(ctx.published(stage, "model"), ctx.published(stage, MASTERS), ())


#: The dense delta over the folder that is its own bf16 cast.
MASTERS = "masters.safetensors"
SFT = Stage("sft", 1, sft)
REWARD = Stage("reward", 1, reward)
