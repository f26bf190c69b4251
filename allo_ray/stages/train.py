"""The stages that train on pairs: warm-up, forgetting, learning, and the methods to compare with."""

from __future__ import annotations

from typing import Any

from allo_ray.config.train import BaselineConfig, ForgetConfig, LearnConfig, TrainConfig, WarmupConfig
from allo_ray.data.train_rows import build_train_rows
from allo_ray.stages.base import Context, Stage
from allo_ray.stages.training import fit


def warmup(ctx: Context) -> None:
    """Full-parameter training for one epoch (Eq. 2); its weight changes rank the neurons."""
    config = WarmupConfig(**ctx.settings["train"])
    loss = {"dpo": "dpo", "sft": "sft", "npo": "npo_sequence"}[config.method]
    _train(ctx, WARMUP, config, loss, {} if loss == "sft" else {"beta": config.beta})


def forget(ctx: Context) -> None:
    """Masked NPO on the k1 % neurons (Eq. 7)."""
    config = ForgetConfig(**ctx.settings["train"])
    following = ctx.config.learn
    logprobs = following is not None and following.reference == "start" and following.dtype == config.dtype
    args = {"beta": config.beta}
    _train(ctx, FORGET, config, "npo", args, logprobs=logprobs, u=config.u, weight=config.weight)


def learn(ctx: Context) -> None:
    """Masked DPO on the k2 % neurons (Eq. 9)."""
    config = LearnConfig(**ctx.settings["train"])
    own = config.reference == "start" or not ctx.model("start").deltas
    _train(ctx, LEARN, config, "masked_dpo", {"beta": config.beta, "v": config.v}, own_reference=own)


def baseline(ctx: Context) -> None:
    """Another method on the same pairs, from the same backbone."""
    config = BaselineConfig(**ctx.settings["train"])
    weight = "blame" if config.needs_scores else "none"
    _train(ctx, BASELINE, config, config.loss, config.args, weight=weight)


def _train(
    ctx: Context,
    stage: Stage,
    config: TrainConfig,
    loss: str,
    args: dict[str, Any],
    own_reference: bool = True,
    logprobs: bool = False,
    **weights: Any,
) -> None:
    seed = ctx.settings["seed"]
    rows = ctx.out / "rows.parquet"
    if not rows.exists():  # a resumed attempt reads the rows it began with
        ctx.facts["rows"] = build_train_rows(
            rows,
            pairs=ctx.file("pairs", "pairs.parquet"),
            logprobs=ctx.file("reference", "logprobs"),
            scores=ctx.file("scores", "token_scores.parquet") if "scores" in ctx.inputs else None,
            epochs=config.epochs,
            seed=seed,
            **weights,
        )
    selection = "selection" if "selection" in ctx.inputs else None
    fit(ctx, stage, config, loss, args, rows, selection, own_reference, logprobs)


WARMUP = Stage("warmup", 1, warmup)
FORGET = Stage("forget", 1, forget)
LEARN = Stage("learn", 2, learn)
BASELINE = Stage("baseline", 1, baseline)
