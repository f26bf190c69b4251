"""How neurons are ranked: the paper's Eq. 4, |θ' - θ0| / α, measured once and laid out so that any k is cut from it.

α is one number for all neurons, so it does not matter for a ranking. The bits of a non-negative float32, read as an
integer (the neuron's key), are in the order of the floats: exact selection can count bits instead of sorting floats.

A tensor's importances are kept in blocks of 2^19 neurons. Each block lies in falling order of the keys' high 16 bits
(its bins), and by flat index within a bin, beside the neurons' places in the block. So the top k % of a block is a
prefix of it, and only one bin has to be looked at more closely.

Shapes: N_t neurons of tensor t; n of a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from allo_ray.errors import UserError

#: Keys have this many bits; the neuron with the larger key is selected first.
KEY_BITS = 31
LOW_BITS = 15
BINS, LOWS = 1 << (KEY_BITS - LOW_BITS), 1 << LOW_BITS
LARGEST = (1 << KEY_BITS) - 1
#: Neurons of a block; sorting it takes about 20 MB beside the tensor.
BLOCK = 1 << 19
#: Every so many importances of a block one is kept apart, to find a bin without reading the block.
STEP = 1 << 11
_INFINITY = 0x7F800000


@dataclass(frozen=True)
class Counted:
    """How often each bin occurs in one tensor; bins that do not are absent.

    Attributes:
        bins: int32, rising.
        counts: int64, of the same length.
    """

    name: str
    shape: tuple[int, ...]
    bins: np.ndarray
    counts: np.ndarray

    @property
    def size(self) -> int:
        """N_t."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Ranked:
    """One tensor's importances, block by block; stored ones are read where they are sliced.

    Attributes:
        importance: `[a:b]` gives float32; each block in falling order of its bins.
        order: `[a:b]` gives int32: the place in its block of each of them.
        samples: float32 [N_t / STEP, rounded up]: every STEP-th importance.
    """

    name: str
    size: int
    importance: Any
    order: Any
    samples: Tensor

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Begin and end of each block."""
        return ((start, min(start + BLOCK, self.size)) for start in range(0, self.size, BLOCK))


def measure(name: str, before: Tensor, after: Tensor) -> Tensor:
    """Importances of one tensor.

    Args:
        before: float32, θ0.
        after: float32, θ'; overwritten, so that no third tensor is held.

    Returns:
        float32 [N_t], |θ' - θ0|, in the storage of `after`.

    Raises:
        UserError: a difference is infinite or not a number.
    """
    assert before.dtype == after.dtype == torch.float32, name
    assert before.shape == after.shape, name
    found = after.view(-1).sub_(before.reshape(-1)).abs_()
    bits = found.view(torch.int32).numpy()
    if bits.size and bits.max() >= _INFINITY:
        raise UserError(
            f"{name}: the update of neuron {bits.argmax()} is not finite. Look at the warm-up's metrics; train again "
            "with a lower learning rate or in float32."
        )
    return found


def rank(name: str, shape: tuple[int, ...], importance: Tensor, order: Tensor) -> tuple[Ranked, Counted]:
    """Sorts the blocks of one tensor, in place, and counts its bins.

    Args:
        importance: float32 [N_t], from `measure`.
        order: int32 [N_t], written.
    """
    values, places = importance.numpy(), order.numpy()
    counts = np.zeros(BINS, dtype=np.int64)
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK]
        bins = block.view(np.int32) >> LOW_BITS
        counts += np.bincount(bins, minlength=BINS)
        falling = np.argsort((BINS - 1 - bins).astype(np.uint16), kind="stable")  # radix: linear in n
        places[start : start + BLOCK] = falling
        block[:] = block[falling]
    held = np.flatnonzero(counts)
    ranked = Ranked(name, len(values), importance, order, torch.from_numpy(values[::STEP].copy()))
    return ranked, Counted(name, shape, held.astype(np.int32), counts[held])


@dataclass(frozen=True)
class Ranking:
    """An order of all neurons of a model.

    Attributes:
        order: "top": largest |θ' - θ0| first; "last": smallest first; "random": by a hash of seed, tensor and index.
        seed: of "random".
    """

    order: Literal["top", "last", "random"]
    seed: int = 0

    def count(self, tensor: Ranked) -> Counted:
        """Bins of a random order's keys, which no measured importance tells."""
        counts = np.zeros(BINS, dtype=np.int64)
        for start, stop in tensor.blocks():
            counts += np.bincount(self._hashed(tensor.name, start, stop) >> LOW_BITS, minlength=BINS)
        held = np.flatnonzero(counts)
        return Counted(tensor.name, (tensor.size,), held.astype(np.int32), counts[held])

    def bins(self, counted: Counted) -> np.ndarray:
        """The bins of this order's keys, beside `counted.counts`, where they were counted by importance."""
        return BINS - 1 - counted.bins if self.order == "last" else counted.bins

    def near(
        self, tensor: Ranked, start: int, stop: int, wanted: int, above: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Looks at one block around one bin.

        Args:
            start, stop: the block.
            wanted: the bin, from 0; 65,536 stands for one that holds nothing and has nothing above it.
            above: whether the neurons of higher bins are asked for.

        Returns:
            Places in the block of the neurons in higher bins, rising; of those in the bin, rising; int32 keys of
            the latter.
        """
        if self.order == "random":
            keys = self._hashed(tensor.name, start, stop)
            bins = keys >> LOW_BITS
            inside = np.flatnonzero(bins == wanted)
            return np.flatnonzero(bins > wanted), inside, keys[inside]
        last = self.order == "last"
        level = BINS - 1 - wanted if last else wanted
        marks = tensor.samples[start // STEP : -(-stop // STEP)].view(torch.int32).numpy() >> LOW_BITS
        begin = start + STEP * max(0, int((marks > level).sum()) - 1)
        end = min(start + STEP * int((marks >= level).sum()), stop)
        bits = tensor.importance[begin:end].view(torch.int32).numpy()
        bins = bits >> LOW_BITS
        first, after = begin + int((bins > level).sum()), begin + int((bins >= level).sum())
        keys = bits[first - begin : after - begin]
        inside = tensor.order[first:after].numpy()
        higher = np.empty(0, np.int32)
        if above:
            higher = np.sort((tensor.order[after:stop] if last else tensor.order[start:first]).numpy())
        return higher, inside, LARGEST - keys if last else keys

    def _hashed(self, name: str, start: int, stop: int) -> np.ndarray:
        """The high 31 bits of splitmix64 at the neurons' places in a stream of this seed and tensor; int32 [n]."""
        digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=8).digest()
        with np.errstate(over="ignore"):
            z = np.arange(start + 1, stop + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            z += np.uint64(int.from_bytes(digest, "little"))
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z ^= z >> np.uint64(31)
        return (z >> np.uint64(64 - KEY_BITS)).astype(np.int32)
