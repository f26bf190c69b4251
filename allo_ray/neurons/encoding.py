"""Sorted flat indices of one tensor as bytes: a bit for each neuron, or the gaps between selected ones.

Shapes: N neurons of the tensor, K selected ones. A bitmask takes N / 8 bytes whatever K is; gaps take one byte a
selected neuron plus one for every 255 neurons of a gap, so they win below about 12 %.
"""

from __future__ import annotations

import numpy as np

#: A gap byte of this value says: 255 neurons further, and no neuron here.
ESCAPE = 255

BITS, GAPS = "bits", "gaps"


def encode(indices: np.ndarray, size: int) -> tuple[str, np.ndarray]:
    """Encodes sorted, distinct flat indices.

    Args:
        indices: [K] integers in [0, size), strictly rising.
        size: N.

    Returns:
        The encoding's name ("bits" or "gaps", whichever is smaller) and the bytes, uint8.
    """
    skipped = np.diff(indices.astype(np.int64), prepend=-1) - 1
    escapes = skipped // ESCAPE
    if len(indices) + int(escapes.sum()) < (size + 7) // 8:
        ends = np.cumsum(escapes + 1) - 1
        encoded = np.full(int(ends[-1]) + 1 if len(ends) else 0, ESCAPE, dtype=np.uint8)
        encoded[ends] = skipped % ESCAPE
        return GAPS, encoded
    mask = np.zeros(size, dtype=bool)
    mask[indices] = True
    return BITS, np.packbits(mask)


def decode(kind: str, encoded: np.ndarray, size: int) -> np.ndarray:
    """Inverse of `encode`: the sorted flat indices, int64 [K]."""
    if kind == BITS:
        return np.flatnonzero(np.unpackbits(encoded, count=size))
    ends = encoded != ESCAPE
    return np.cumsum(encoded + ends.astype(np.int64))[ends] - 1
