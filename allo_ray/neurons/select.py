"""Exact selection of the k N most important neurons of a whole model, cut from its ranked importances.

A radix select on the 31 bits of the keys (see `importance`). The bins of all tensors, counted when the importances
were measured, say for every k in which of the 65,536 bins its last neuron lies. A pass over the tensors takes every
neuron above that bin, and those in the bin with their keys, of which the best are then kept: it reads the selected
neurons' share of the importances, whatever the size of the model. Where a bin is crowded (bf16 differences, or a
single Adam step: many neurons share one value) a pass before it counts its keys by their low 15 bits, so that only
neurons with the very same key are left to choose from. Ties go by tensor order, then flat index: the result is that
of a stable sort of all N keys, at the memory of the selected indices.

A pass is a function of one tensor, and what it returns is put together in tensor order, so passes can run as tasks
on many machines: `Mapper`.

Shapes: N_t neurons of tensor t, N their sum over the tensors that may be selected, K selected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from allo_ray.errors import UserError
from allo_ray.neurons.importance import BINS, KEY_BITS, LOW_BITS, LOWS, Counted, Ranked, Ranking
from allo_ray.neurons.selection import Selection, index_dtype

#: Applies a function to the tensors of these names, and gives the results in tensor order.
Mapper = Callable[[Callable[[Ranked], Any], Collection[str]], Iterable[Any]]
Order = Literal["top", "last", "random"] | tuple[str, float, float]

#: A bin is crowded if it has more than one neuron in this many.
CROWDED = 128


@dataclass(frozen=True)
class Cut:
    """Where a selection ends: keys above `high` are in; of those from `low` to `high` the first `need` by rank."""

    low: int
    high: int
    need: int


@dataclass(frozen=True)
class Gathered:
    """One tensor's part of one cut: flat indices above it; flat indices within it and their keys."""

    above: np.ndarray
    within: np.ndarray
    keys: np.ndarray


def select(
    counted: Sequence[Counted],
    mapper: Mapper,
    ks: Sequence[float],
    order: Order = "top",
    include: str | None = None,
    seed: int = 0,
    base: str = "",
) -> list[Selection]:
    """Selects exactly round(k N) neurons for each k, from one set of passes.

    Args:
        counted: every tensor of the model, in its order, counted by importance.
        mapper: runs a pass over the same tensors' ranked importances, perhaps in parallel.
        ks: shares in (0, 1] of the neurons that `include` admits; not read for a band.
        order: "top": the largest |θ' - θ0|; "last": the smallest; "random": any, by the seed;
            ("band", lo, hi): those ranked from share lo to share hi of the "top" order.
        include: regular expression; only tensors in whose name it is found can be selected. N counts these alone.
        seed: of "random".
        base: fingerprint of the base folder, for the selections to remember.

    Returns:
        One selection for each k; for a band, one.

    Raises:
        UserError: a share is out of range or selects nothing; no tensor matches.
    """
    band = not isinstance(order, str)
    shares = list(ks) if isinstance(order, str) else list(order[1:])
    ranking = Ranking(order if isinstance(order, str) else "top", seed)
    try:
        admits = re.compile(include or "").search
    except re.error as error:
        raise UserError(f"locate.include {include!r}: no regular expression ({error}). Mend it.") from None
    shapes = {one.name: one.shape for one in counted}
    admitted = [one for one in counted if admits(one.name)]
    names = [one.name for one in admitted]
    total = sum(one.size for one in admitted)
    wanted = _counts(shares, total, band, include)

    bins = np.zeros(BINS, dtype=np.int64)
    for one in mapper(ranking.count, names) if ranking.order == "random" else admitted:
        bins[ranking.bins(one)] += one.counts
    cuts = [_cut(bins, count, LOW_BITS) for count in wanted]
    crowded = {cut.low for cut in cuts if cut.need and bins[cut.low >> LOW_BITS] * CROWDED > total}
    if crowded:
        lows = {low: np.zeros(LOWS, dtype=np.int64) for low in crowded}
        for found in mapper(partial(refine, ranking, sorted(crowded)), names):
            for low, counts in found.items():
                lows[low] += counts
        cuts = [_narrowed(cut, lows[cut.low]) if cut.low in lows else cut for cut in cuts]
    gathered = [list(found) for found in mapper(partial(gather, ranking, cuts), names)]
    chosen = []
    for number, cut in enumerate(cuts):
        parts = [found[number] for found in gathered]
        for found in gathered:
            found[number] = None  # held by `parts` alone, which `resolve` empties
        chosen.append(resolve(cut, parts))
    if band:
        chosen = [_without(chosen[1], chosen[0])]
        shares = [shares[1] - shares[0]]
    told = order if isinstance(order, str) else "band"
    return [
        _selection(shapes, dict(zip(names, indices, strict=True)), base, k, told)
        for k, indices in zip(shares, chosen, strict=True)
    ]


def refine(ranking: Ranking, lows: Sequence[int], tensor: Ranked) -> dict[int, np.ndarray]:
    """Pass over one tensor for crowded bins: int64 [LOWS] for each, its keys counted by their low bits.

    Args:
        lows: the smallest key of each crowded bin.
    """
    counts = {low: np.zeros(LOWS, dtype=np.int64) for low in lows}
    for start, stop in tensor.blocks():
        for low in lows:
            _, _, keys = ranking.near(tensor, start, stop, low >> LOW_BITS, above=False)
            counts[low] += np.bincount(keys & (LOWS - 1), minlength=LOWS)
    return counts


def gather(ranking: Ranking, cuts: Sequence[Cut], tensor: Ranked) -> list[Gathered]:
    """Last pass over one tensor: its part of every cut."""
    return [_gathered(ranking, cut, tensor) for cut in cuts]


def _gathered(ranking: Ranking, cut: Cut, tensor: Ranked) -> Gathered:
    stored = np.int32 if index_dtype(tensor.size) == torch.int32 else np.int64
    nothing = np.empty(0, stored)
    parts = [(nothing, nothing, np.empty(0, np.int32))]
    for start, stop in tensor.blocks():
        above, inside, keys = ranking.near(tensor, start, stop, cut.low >> LOW_BITS)
        higher, within = inside[keys > cut.high], (keys >= cut.low) & (keys <= cut.high)
        if len(higher):
            above = np.sort(np.concatenate([above, higher]))
        parts.append((above.astype(stored) + start, inside[within].astype(stored) + start, keys[within]))
    above, within, keys = (np.concatenate(column) for column in zip(*parts, strict=True))
    if cut.low == cut.high:  # all equal: only the first can be among the first of all tensors
        within, keys = within[: cut.need], keys[: cut.need]
    return Gathered(above, within, keys)


def resolve(cut: Cut, parts: list[Gathered | None]) -> list[np.ndarray]:
    """Settles who of those within the cut is in.

    Args:
        parts: of every tensor in order. Emptied on the way, since together they are as large as the selection.

    Returns:
        For each tensor its selected flat indices, rising.
    """
    keys = np.concatenate([part.keys for part in parts if part])
    taken = np.zeros(len(keys), dtype=bool)
    # Stable: among equal keys the earlier tensor, and within it the lower index, comes first.
    taken[np.argsort(-keys, kind="stable")[: cut.need]] = True
    out, at = [], 0
    for number, part in enumerate(parts):
        assert part is not None
        parts[number] = None
        mine = taken[at : at + len(part.keys)]
        at += len(part.keys)
        out.append(np.sort(np.concatenate([part.above, part.within[mine]]), kind="stable"))
    return out


def _counts(shares: Sequence[float], total: int, band: bool, include: str | None) -> list[int]:
    """round(k N) for each share, checked."""
    if total == 0:
        raise UserError(f"locate.include {include!r}: no tensor's name matches. Mend the expression.")
    for share in shares:
        if not 0 <= share <= 1:
            raise UserError(f"a share of neurons is {share}; it has to lie between 0 and 1.")
    counts = [round(share * total) for share in shares]
    for share, count in zip(shares, counts, strict=True):
        if count == 0 and not band:
            raise UserError(f"k = {share} selects none of {total:,} neurons. Raise it.")
    if band and counts[0] >= counts[1]:
        raise UserError(
            f"the band from {shares[0]} to {shares[1]} holds none of {total:,} neurons. Widen it."
        )
    return counts


def _cut(counts: np.ndarray, wanted: int, low_bits: int) -> Cut:
    """The bin in which the last of `wanted` keys lies, counted from the highest."""
    if wanted == 0:
        return Cut(1 << KEY_BITS, 1 << KEY_BITS, 0)
    reached = np.cumsum(counts[::-1])
    at = int(np.searchsorted(reached, wanted))
    low = (len(counts) - 1 - at) << low_bits
    return Cut(low, low + (1 << low_bits) - 1, wanted - int(reached[at] - counts[::-1][at]))


def _narrowed(cut: Cut, lows: np.ndarray) -> Cut:
    """The same cut, down to one key."""
    exact = _cut(lows, cut.need, 0)
    return Cut(cut.low + exact.low, cut.low + exact.high, exact.need)


def _without(whole: list[np.ndarray], part: list[np.ndarray]) -> list[np.ndarray]:
    return [np.setdiff1d(left, right, assume_unique=True) for left, right in zip(whole, part, strict=True)]


def _selection(
    shapes: dict[str, tuple[int, ...]], indices: dict[str, np.ndarray], base: str, k: float, order: str
) -> Selection:
    dense = all(
        name in indices and len(indices[name]) == torch.Size(shape).numel() for name, shape in shapes.items()
    )
    kept = {name: torch.from_numpy(found) for name, found in indices.items() if len(found) and not dense}
    return Selection(list(shapes), shapes, kept, dense, base, k, order)
