"""BCO: binary classifier optimisation on pairs (Jung et al. 2024, arXiv 2404.04656)."""

from __future__ import annotations

import torch.nn.functional as F

from allo_ray.losses.base import LossInputs, LossOutput, pair_output, pair_scores


def bco(inputs: LossInputs, beta: float = 0.1) -> LossOutput:
    """-log sigmoid(beta log-ratio of y+) - log sigmoid(-beta log-ratio of y-).

    The paired form without reward shift, as TRL's `bco_pair`: a shift that is a mean over the batch would make the
    gradient depend on how the batch was cut.
    """
    chosen, rejected = pair_scores(inputs, inputs.logratio * inputs.weight)
    losses = -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)
    return pair_output(inputs, losses, chosen, rejected, inputs.weight, beta)
