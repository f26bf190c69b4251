"""Hyper-parameters of the trained stages, and the resources they train on."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from allo_ray.config.base import Count, Dtype, Fraction, PositiveFraction, Resources, Section, cpu_dtype
from allo_ray.config.data import DataConfig


class TrainerConfig(Section):
    """Where training runs; the result depends on it only by the order of float sums."""

    runtime = True

    #: Workers, or (fewest, most) for training that follows the cluster.
    workers: Count = 1
    #: Seconds between two looks whether there is room for more workers; they then start from the last checkpoint.
    resize_seconds: float = Field(default=60, gt=0)
    num_cpus: float = Field(default=1, gt=0)
    num_gpus: float = Field(default=0, ge=0)
    #: What a worker takes beside these: {trainer: 1} keeps it to nodes that offer it (cluster/kuberay).
    resources: Resources = Field(default_factory=dict)
    #: "pack": workers on as few nodes as hold them, where gradients travel least. "spread": over as many as there are.
    placement: Literal["pack", "spread"] = "pack"
    threads: int | None = Field(default=None, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload_optimizer: bool = False
    #: Activations are computed again in the backward pass. null: under ZeRO 3 only, where every gathered weight would
    #: otherwise stay in memory from its forward to its backward pass.
    gradient_checkpointing: bool | None = None
    #: Tokens of one forward and backward pass (prompt once, both responses).
    micro_batch_tokens: int = Field(default=2048, ge=16)
    #: Optimiser steps between two checkpoints; 0 keeps none.
    checkpoint_every: int = Field(default=50, ge=0)
    max_failures: int = Field(default=3, ge=0)

    @property
    def checkpointing(self) -> bool:
        """`gradient_checkpointing`, decided."""
        return self.zero_stage == 3 if self.gradient_checkpointing is None else self.gradient_checkpointing


class TrainConfig(Section):
    """One stage's optimisation. Defaults are the paper's (Table 5) where it names them."""

    lr: float = Field(gt=0)
    #: Pairs (or sequences) of a global batch, whatever the number of workers.
    batch_size: int = Field(default=32, ge=1)
    epochs: int = Field(default=1, ge=1)
    warmup_ratio: Fraction = 0.1
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = Field(default=0, ge=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = Field(default=1e-8, gt=0)
    #: Largest gradient norm over the trained neurons; null leaves gradients as they are.
    clip: float | None = Field(default=1.0, gt=0)
    #: "instances": token sums, mean over the instances of the global batch; "tokens": over its weighted tokens.
    normalize: Literal["instances", "tokens"] = "instances"
    #: Of the weights in memory; values are float32 always. By default bfloat16 on GPUs and on CPUs that have it in
    #: hardware, else float32.
    dtype: Dtype = Field(default_factory=cpu_dtype)


class SftConfig(TrainConfig):
    """The short supervised stage that makes the backbone."""

    #: Prompts with full references; the run's own data by default.
    data: DataConfig | None = None


class WarmupConfig(TrainConfig):
    """Full-parameter training whose weight changes say which neurons matter (Eq. 2 to 4; Fig. 3 for the others)."""

    method: Literal["dpo", "sft", "npo"] = "dpo"
    beta: float = Field(default=0.1, gt=0)


class LocateConfig(Section):
    """How neurons are ranked (Eq. 4, and the masks of Fig. 1 and Table 4)."""

    order: Literal["top", "last", "random", "band"] = "top"
    #: For order "band": the ranks selected, as shares of all neurons; its width is then k.
    band: tuple[Fraction, Fraction] | None = None
    #: Regular expression; only tensors whose name matches can be selected.
    include: str | None = None

    @model_validator(mode="after")
    def _band(self) -> LocateConfig:
        if (self.order == "band") != (self.band is not None):
            raise ValueError("locate.band belongs to locate.order: band, and is needed there")
        if self.band is not None and self.band[0] >= self.band[1]:
            raise ValueError("locate.band must be [low, high] with low < high")
        try:
            re.compile(self.include or "")
        except re.error as error:
            raise ValueError(f"locate.include is no regular expression: {error}") from None
        return self


class RewardConfig(TrainConfig):
    """The small model that learns to write the teacher's corrections (paper 4.2)."""

    #: Folder or hub name; the run's backbone by default.
    model: str | None = None
    #: Rewrites it is trained on at most.
    limit: int | None = Field(default=None, ge=1)


class ForgetConfig(TrainConfig):
    """Masked NPO (Eq. 5 and 7)."""

    k: PositiveFraction = 0.05
    u: Fraction = 0.95
    beta: float = Field(default=0.1, gt=0)
    #: "threshold": r = 1 where P_re < u (Eq. 5). "soft": the released code's raw P_re. "none": every token.
    weight: Literal["threshold", "soft", "none"] = "threshold"


class LearnConfig(TrainConfig):
    """Masked DPO (Eq. 8 and 9)."""

    k: PositiveFraction = 0.1
    v: Fraction = 0.2
    beta: float = Field(default=0.1, gt=0)
    #: Which model the ratios are taken against: the stage's own start, or the backbone.
    reference: Literal["start", "sft"] = "start"


class BaselineConfig(TrainConfig):
    """A method to compare with, trained on the same pairs from the same backbone."""

    #: "sft" learns the chosen responses (RFT where they are samples); "npo_sequence" is Eq. 6, "npo" its token form;
    #: "ppo" is Vanilla PPO on the stored responses, "ppo_a2c" takes token advantages from P_re (see losses/ppo.py).
    loss: Literal["sft", "dpo", "rdpo", "ipo", "bco", "simpo", "npo_sequence", "npo", "ppo", "ppo_a2c"]
    #: Arguments of the loss, e.g. {beta: 0.1}.
    args: dict[str, Any] = Field(default_factory=dict)
    #: Share of neurons trained; 1 is full-parameter training.
    k: PositiveFraction = 1.0

    @property
    def needs_scores(self) -> bool:
        """Whether it reads P_re, and so needs the sections `rewrite` and `reward`."""
        return self.loss == "ppo_a2c"
