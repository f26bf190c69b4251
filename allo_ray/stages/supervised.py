"""The supervised stages: the backbone's short SFT, and the reward model that learns to write corrections."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from allo_ray import tables
from allo_ray.config.train import RewardConfig, SftConfig
from allo_ray.data.lookup import stream
from allo_ray.data.tokenise import Tokeniser
from allo_ray.data.train_rows import build_supervised_rows
from allo_ray.errors import UserError
from allo_ray.neurons.delta import export
from allo_ray.stages.base import Context, Stage
from allo_ray.stages.training import fit
from allo_ray.store import local_path
from allo_ray.train.job import DELTA


def sft(ctx: Context) -> None:
    """One epoch on (prompt, reference). The result is the backbone: masters in float32, and a folder model/ in bf16."""
    rows = ctx.out / "rows.parquet"
    if not rows.exists():
        seed, epochs = ctx.settings["seed"], ctx.settings["train"]["epochs"]
        ctx.facts["rows"] = build_supervised_rows(rows, _references(ctx), epochs=epochs, seed=seed)
    fit(ctx, SFT, SftConfig(**ctx.settings["train"]), "sft", {}, rows)
    _fold(ctx, SFT)


def reward(ctx: Context) -> None:
    """Learns the teacher's corrections given problem, correct solution and prediction (paper 4.2)."""
    config = RewardConfig(**ctx.settings["train"])
    rows = ctx.out / "rows.parquet"
    if not rows.exists():
        rewrites = (
            {"id": row["id"], "prompt_ids": row["context_ids"], "response_ids": row["rewrite_ids"]}
            for row in islice(stream(tables.REWRITES, ctx.file("rewrites", "rewrites.parquet")), config.limit)
        )
        seed = ctx.settings["seed"]
        ctx.facts["rows"] = build_supervised_rows(rows, rewrites, epochs=config.epochs, seed=seed)
    fit(ctx, REWARD, config, "sft", {}, rows)
    _fold(ctx, REWARD)


def _references(ctx: Context) -> Iterator[dict[str, Any]]:
    """Prompts that have a full reference, as SEQUENCES rows."""
    tokeniser = Tokeniser(str(local_path(ctx.model("start").base)))
    prompts = ctx.file("prompts", "prompts.parquet")
    found = 0
    for row in stream(tables.PROMPTS, prompts):
        if row["reference"]:
            found += 1
            response = tokeniser.response(row["reference"])
            yield {"id": row["id"], "prompt_ids": row["prompt_ids"], "response_ids": response}
    if not found:
        raise UserError("sft: none of its prompts has a reference to learn. Name the column under data.columns.reference.")


def _fold(ctx: Context, stage: Stage) -> None:
    """Makes the trained model the base of what follows: its bf16 cast as an ordinary folder, its masters beside."""
    start = ctx.model("start")
    export(local_path(start.base), [*map(local_path, start.deltas), ctx.out / DELTA], ctx.out / "model")
    ctx.hand_on(ctx.published(stage, "model"), ctx.published(stage, DELTA), ())


SFT = Stage("sft", 1, sft)
REWARD = Stage("reward", 1, reward)
