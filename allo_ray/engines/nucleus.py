"""Top-p without sorting the vocabulary.

Legend: S sequences, V vocabulary. vLLM and transformers sort all V logits of every step. But the tokens below
(1 - p) / V have together less than the mass 1 - p that top-p cuts off, so only those above it need sorting: a few
hundred. Sampling SmolLM2 (V = 49,152) on the CPU spent 40 % of its time in that sort.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def keep_nucleus(logits: Tensor, p: Tensor) -> Tensor:
    """Sets the logits outside the nucleus to -inf, in place, and returns them.

    The nucleus is the fewest tokens whose probabilities reach p: a token belongs to it if those before it do not
    reach p yet. Tokens as likely as the last one belong too, so the order of equal logits decides nothing.

    Args:
        logits: [S, V], any float dtype, on any device.
        p: [S], in (0, 1].
    """
    probs = logits.softmax(-1, dtype=torch.float32).cpu()
    rows, shares = probs.numpy(), p.to("cpu", torch.float64).numpy()
    cuts = np.zeros(len(rows), dtype=np.float32)
    for i, (row, share) in enumerate(zip(rows, shares, strict=True)):
        if share < 1:
            likely = np.sort(row[row > (1 - share) / len(row)])[::-1]
            before = np.cumsum(likely, dtype=np.float64) - likely
            cuts[i] = likely[max(1, int((before < share).sum())) - 1]
    outside = probs < torch.from_numpy(cuts)[:, None]
    return logits.masked_fill_(outside.to(logits.device), -torch.inf)
