"""Supervised fine-tuning: the negative log-likelihood of the response."""

from __future__ import annotations

from allo_ray.losses.base import LossInputs, LossOutput


def sft(inputs: LossInputs) -> LossOutput:
    """Sum over instances of -sum_j w_j log P(y_j). Each sequence with a weighted token is an instance."""
    weighted = inputs.weight != 0
    return LossOutput(
        sum=-(inputs.policy * inputs.weight).sum(),
        count=(inputs.per_sequence(weighted.float()) > 0).sum(),
        tokens=weighted.sum(),
        metrics={"kept": (weighted.sum(), len(weighted))},
    )
