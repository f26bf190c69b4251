"""SimPO: simple preference optimisation, without a reference (Meng et al. 2024, arXiv 2405.14734)."""

from __future__ import annotations

import torch.nn.functional as F

from allo_ray.losses.base import LossInputs, LossOutput, pair_output, pair_scores


def simpo(inputs: LossInputs, beta: float = 2.0, gamma: float = 1.0) -> LossOutput:
    """-log sigmoid(beta (mean log-prob of y+ - mean log-prob of y-) - gamma).

    Args:
        gamma: the margin asked for, in units of reward.
    """
    lengths = inputs.lengths().clamp(min=1)
    chosen, rejected = pair_scores(inputs, inputs.policy * inputs.weight / lengths[inputs.sequence])
    losses = -F.logsigmoid(beta * (chosen - rejected) - gamma)
    output = pair_output(inputs, losses, chosen, rejected, inputs.weight, beta)
    for name in ("chosen_logratio", "rejected_logratio"):  # there is no reference to take them against
        del output.metrics[name]
    return output
