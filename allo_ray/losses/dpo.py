"""Direct preference optimisation: the paper's Eq. 2, and Eq. 9 with its token weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from allo_ray.losses.base import LossInputs, LossOutput, pair_output, pair_scores
from allo_ray.losses.noisy import keep


def dpo(inputs: LossInputs, beta: float = 0.1) -> LossOutput:
    """Eq. 2: -log sigmoid(beta (log-ratio of y+ - log-ratio of y-)), each the weighted sum over the tokens."""
    return _dpo(inputs, inputs.weight, beta)


def masked_dpo(inputs: LossInputs, beta: float = 0.1, v: float = 0.2) -> LossOutput:
    """Eq. 9: as `dpo`, without the noisy tokens of y- (Eq. 8), which are found anew at each step.

    Args:
        v: share of the rejected response's own tokens that is dropped, in [0, 1].
    """
    is_rejected = inputs.sequence % 2 == 1
    kept = keep(inputs.logratio.detach(), inputs.sequence, inputs.sequences, v)
    return _dpo(inputs, inputs.weight.where(kept | ~is_rejected, 0.0), beta)


def _dpo(inputs: LossInputs, weight: Tensor, beta: float) -> LossOutput:
    chosen, rejected = pair_scores(inputs, inputs.logratio * weight)
    losses = -F.logsigmoid(beta * (chosen - rejected))
    return pair_output(inputs, losses, chosen, rejected, weight, beta)
