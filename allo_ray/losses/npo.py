"""Negative preference optimisation, which forgets: the paper's Eq. 6 (sequences) and Eq. 7 (tokens)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from allo_ray.losses.base import LossInputs, LossOutput


def npo(inputs: LossInputs, beta: float = 0.1) -> LossOutput:
    """Eq. 7: -sum_j log sigmoid(-beta log-ratio_j) over the tokens with r_j = 1; `weight` holds r.

    Tokens with r = 0 are left out: Eq. 7 would add a constant ln 2 for each. A soft weight multiplies the token's
    term, as in the paper's released code (which divides by the count of weighted tokens: `normalize: tokens`). An
    instance is a sequence with a weighted token.
    """
    return _forget(inputs, (-F.logsigmoid(-beta * inputs.logratio) * inputs.weight).sum())


def npo_sequence(inputs: LossInputs, beta: float = 0.1) -> LossOutput:
    """Eq. 6: -log sigmoid(-beta * sum_j w_j log-ratio_j), one term for each sequence with a weighted token."""
    ratios = inputs.per_sequence(inputs.logratio * inputs.weight)
    counted = inputs.per_sequence((inputs.weight != 0).float()) > 0
    return _forget(inputs, (-F.logsigmoid(-beta * ratios) * counted).sum())


def _forget(inputs: LossInputs, loss: torch.Tensor) -> LossOutput:
    weighted = inputs.weight != 0
    instances = (inputs.per_sequence(weighted.float()) > 0).sum()
    return LossOutput(
        sum=loss,
        count=instances,
        tokens=weighted.sum(),
        metrics={
            "rejected_logratio": ((inputs.logratio * inputs.weight).detach().sum(), instances),
            "kept": (weighted.sum(), len(weighted)),
        },
    )
