"""R-DPO: DPO with a length-regularised reward (Park et al. 2024, arXiv 2403.19159)."""

from __future__ import annotations

import torch.nn.functional as F

from allo_ray.losses.base import LossInputs, LossOutput, pair_output, pair_scores


def rdpo(inputs: LossInputs, beta: float = 0.1, alpha: float = 0.05) -> LossOutput:
    """-log sigmoid(beta (log-ratio of y+ - log-ratio of y-) + alpha (|y+| - |y-|)).

    The sign follows from the reward r - alpha |y|: its optimal policy has r = beta log-ratio + alpha |y| + const. So a
    pair whose chosen response is longer counts as already ahead, and its gradient is smaller.

    Args:
        alpha: penalty for each token of length, in units of reward.
    """
    chosen, rejected = pair_scores(inputs, inputs.logratio * inputs.weight)
    lengths = inputs.lengths()
    losses = -F.logsigmoid(beta * (chosen - rejected) + alpha * (lengths[0::2] - lengths[1::2]))
    return pair_output(inputs, losses, chosen, rejected, inputs.weight, beta)
