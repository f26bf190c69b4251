"""IPO: identity preference optimisation (Azar et al. 2024, arXiv 2310.12036, Eq. 17)."""

from __future__ import annotations

from allo_ray.losses.base import LossInputs, LossOutput, pair_output, pair_scores


def ipo(inputs: LossInputs, beta: float = 0.1) -> LossOutput:
    """(mean log-ratio of y+ - mean log-ratio of y- - 1 / (2 beta))^2.

    Means over a response's tokens, the form that the authors used for their results and TRL follows.

    Args:
        beta: the paper's tau.
    """
    lengths = inputs.lengths().clamp(min=1)
    chosen, rejected = pair_scores(inputs, inputs.logratio * inputs.weight / lengths[inputs.sequence])
    losses = (chosen - rejected - 1 / (2 * beta)) ** 2
    return pair_output(inputs, losses, chosen, rejected, inputs.weight, beta)
