"""Noisy tokens: the paper's Eq. 8.

Shapes: R response tokens, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep(logratio: Tensor, sequence: Tensor, sequences: int, v: float) -> Tensor:
    """Eq. 8's q: drops the floor(v * n) tokens with the highest ratio of each sequence's own n tokens.

    A tie at the cut drops none of the tied; so where all ratios are equal, as at the first step, nothing is dropped
    (for v < 1; v = 1 drops every token).

    Args:
        logratio: float32 [R], log of policy over reference; the ratio's order is its order.
        sequence: int64 [R], the sequence of each token, in 0..S-1.
        sequences: S.
        v: in [0, 1].

    Returns:
        bool [R]: True where q = 1.
    """
    if len(logratio) == 0:
        return torch.ones_like(logratio, dtype=torch.bool)
    by_ratio = logratio.argsort(descending=True, stable=True)
    ranked = logratio[by_ratio[sequence[by_ratio].argsort(stable=True)]]
    lengths = torch.bincount(sequence, minlength=sequences)
    # v * n may fall just short of the whole number that it stands for (0.29 * 100 = 28.999...).
    dropped = (v * lengths.double() + 1e-9).floor().long()
    starts = lengths.cumsum(0) - lengths
    # The highest ratio that stays; everything above it goes.
    best_kept = ranked[(starts + dropped).clamp(max=len(ranked) - 1)].where(dropped < lengths, -torch.inf)
    return logratio <= best_kept[sequence]
