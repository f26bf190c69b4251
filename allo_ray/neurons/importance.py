"""How neurons are ranked: the paper's Eq. 4, |θ' - θ0| / α, as integers that sort the same way.

α is one number for all neurons, so it does not matter for a ranking. The bits of a non-negative float32, read as an
integer, are in the order of the floats: exact selection can count bits instead of sorting floats.

Shapes: n neurons of a stretch of one tensor.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from allo_ray.errors import UserError

#: Keys have this many bits; the neuron with the larger key is selected first.
KEY_BITS = 31
_INFINITY = 0x7F800000


@dataclass(frozen=True)
class Ranking:
    """An order of all neurons of a model.

    Attributes:
        order: "top": largest |θ' - θ0| first; "last": smallest first; "random": by a hash of seed, tensor and index.
        seed: of "random".
    """

    order: Literal["top", "last", "random"]
    seed: int = 0

    def keys(self, name: str, start: int, before: Tensor, after: Tensor) -> np.ndarray:
        """Keys of a stretch of one tensor.

        Args:
            name: the tensor.
            start: flat index of the stretch's first neuron.
            before, after: float32 [n], θ0 and θ'.

        Returns:
            int32 [n], from 0 to 2^31 - 1.

        Raises:
            UserError: a difference is infinite or not a number.
        """
        if self.order == "random":
            return _hashed(self.seed, name, start, len(before))
        bits = (after - before).view(torch.int32).numpy()
        bits &= 0x7FFFFFFF  # the absolute value
        if bits.size and bits.max() >= _INFINITY:
            at = start + int(bits.argmax())
            raise UserError(
                f"{name}: the update of neuron {at} is not finite. Look at the warm-up's metrics; train again with a "
                "lower learning rate or in float32."
            )
        return bits if self.order == "top" else 0x7FFFFFFF - bits


def _hashed(seed: int, name: str, start: int, size: int) -> np.ndarray:
    """The high 31 bits of splitmix64 at the neurons' places in a stream of this seed and tensor; int32 [size]."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    with np.errstate(over="ignore"):
        z = np.arange(start + 1, start + size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z += np.uint64(int.from_bytes(digest, "little"))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(64 - KEY_BITS)).astype(np.int32)
