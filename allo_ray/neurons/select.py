"""Exact selection of the k N most important neurons of a whole model, in two or three passes over its tensors.

A radix select on the 31 bits of the keys (`importance.Ranking`). The first pass counts keys by their high 16 bits,
which says for every k in which of the 65,536 bins its last neuron lies. The last pass takes every neuron above that
bin, and those in the bin with their keys, of which the best are then kept. Where a bin is crowded (bf16 differences,
or a single Adam step: many neurons share one value) a pass between counts its keys by their low 15 bits, so that only
neurons with the very same key are left to choose from. Ties go by tensor order, then flat index: the result is that of
a stable sort of all N keys, at the memory of two tensors and the selected indices.

A pass is a function of one tensor, and what it returns is put together in tensor order, so passes can run as tasks
on many machines: `Mapper`.

Shapes: N_t neurons of tensor t, N their sum over the tensors that may be selected, K selected.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from allo_ray.errors import UserError
from allo_ray.neurons.importance import KEY_BITS, Ranking
from allo_ray.neurons.selection import Selection, index_dtype

#: Gives the tensors of both models, (name, θ0, θ') in float32, from the first on at each call.
Tensors = Callable[[], Iterator[tuple[str, Tensor, Tensor]]]
Result = TypeVar("Result")
#: Applies a function of (name, θ0, θ') to every tensor and gives the results in tensor order.
Mapper = Callable[[Callable[[str, Tensor, Tensor], Any]], Iterable[Any]]
Order = Literal["top", "last", "random"] | tuple[str, float, float]

LOW_BITS = 15
BINS, LOWS = 1 << (KEY_BITS - LOW_BITS), 1 << LOW_BITS
#: Neurons looked at in one go; their keys stay in the processor's cache.
STRETCH = 1 << 17
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
    tensors: Tensors,
    ks: Sequence[float],
    order: Order = "top",
    include: str | None = None,
    seed: int = 0,
    base: str = "",
) -> list[Selection]:
    """Selects exactly round(k N) neurons for each k, from one set of passes.

    Args:
        tensors: gives (name, θ0, θ') of every parameter tensor, float32, in the model's order; called once a pass.
        ks: shares in (0, 1] of the neurons that `include` admits; not read for a band.
        order: "top": the largest |θ' - θ0|; "last": the smallest; "random": any, by the seed;
            ("band", lo, hi): those ranked from share lo to share hi of the "top" order.
        include: regular expression; only tensors in whose name it is found can be selected. N counts these alone.
        seed: of "random".
        base: fingerprint of the base folder, for the selections to remember.

    Returns:
        One selection for each k; for a band, one.

    Raises:
        UserError: a share is out of range or selects nothing; no tensor matches; an update is not finite.
    """
    return select_mapped(partial(_in_turn, tensors), ks, order, include, seed, base)


def select_mapped(
    mapper: Mapper,
    ks: Sequence[float],
    order: Order = "top",
    include: str | None = None,
    seed: int = 0,
    base: str = "",
) -> list[Selection]:
    """As `select`, with the passes mapped over the tensors by `mapper`, which may run them in parallel."""
    band = not isinstance(order, str)
    shares = list(ks) if isinstance(order, str) else list(order[1:])
    ranking = Ranking(order if isinstance(order, str) else "top", seed)
    try:
        admits = re.compile(include or "").search
    except re.error as error:
        raise UserError(f"locate.include {include!r}: no regular expression ({error}). Mend it.") from None

    shapes: dict[str, tuple[int, ...]] = {}
    bins = np.zeros(BINS, dtype=np.int64)
    for name, shape, counts in mapper(partial(histogram, ranking, include)):
        shapes[name] = shape
        bins += counts
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items() if admits(name)}
    total = sum(sizes.values())
    wanted = _counts(shares, total, band, include)
    cuts = [_cut(bins, count, LOW_BITS) for count in wanted]
    crowded = {cut.low for cut in cuts if cut.need and bins[cut.low >> LOW_BITS] * CROWDED > total}
    if crowded:
        lows = {low: np.zeros(LOWS, dtype=np.int64) for low in crowded}
        for counted in mapper(partial(refine, ranking, include, sorted(crowded))):
            for low, counts in counted.items():
                lows[low] += counts
        cuts = [_narrowed(cut, lows[cut.low]) if cut.low in lows else cut for cut in cuts]
    gathered: list[list[Gathered | None] | None] = list(mapper(partial(gather, ranking, include, cuts)))
    chosen = []
    for number, cut in enumerate(cuts):
        parts = [found[number] if found else None for found in gathered]
        for found in gathered:
            if found:
                found[number] = None  # held by `parts` alone, which `resolve` empties
        chosen.append(resolve(cut, parts))
    if band:
        chosen = [_without(chosen[1], chosen[0])]
        shares = [shares[1] - shares[0]]
    told = order if isinstance(order, str) else "band"
    return [_selection(shapes, indices, base, k, told) for k, indices in zip(shares, chosen, strict=True)]


def histogram(
    ranking: Ranking, include: str | None, name: str, before: Tensor, after: Tensor
) -> tuple[str, tuple[int, ...], np.ndarray]:
    """First pass over one tensor: its name, its shape, and int64 [BINS], its keys counted by their high bits."""
    counts = np.zeros(BINS, dtype=np.int64)
    for _, keys in _stretches(ranking, include, name, before, after):
        counts += np.bincount(keys >> LOW_BITS, minlength=BINS)
    return name, tuple(before.shape), counts


def refine(
    ranking: Ranking, include: str | None, lows: Sequence[int], name: str, before: Tensor, after: Tensor
) -> dict[int, np.ndarray]:
    """Pass over one tensor for crowded bins: int64 [LOWS] for each, its keys counted by their low bits.

    Args:
        lows: the smallest key of each crowded bin.
    """
    counts = {low: np.zeros(LOWS, dtype=np.int64) for low in lows}
    for _, keys in _stretches(ranking, include, name, before, after):
        high = keys >> LOW_BITS
        for low in lows:
            counts[low] += np.bincount(keys[high == low >> LOW_BITS] & (LOWS - 1), minlength=LOWS)
    return counts


def gather(
    ranking: Ranking, include: str | None, cuts: Sequence[Cut], name: str, before: Tensor, after: Tensor
) -> list[Gathered] | None:
    """Last pass over one tensor: its part of every cut; None where `include` does not admit it."""
    if include is not None and not re.search(include, name):
        return None
    nothing = np.empty(0, np.int32)
    found: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = [
        [(nothing, nothing, nothing)] for _ in cuts
    ]
    loosest_first = sorted(range(len(cuts)), key=lambda number: cuts[number].low)
    size = index_dtype(before.numel())
    for start, keys in _stretches(ranking, include, name, before, after):
        places: np.ndarray | None = None
        for number in loosest_first:
            cut = cuts[number]
            kept = np.flatnonzero(keys >= cut.low)
            keys = keys[kept]
            places = kept + start if places is None else places[kept]
            above = keys > cut.high
            within = ~above
            stored = places.astype(np.int32 if size == torch.int32 else np.int64)
            found[number].append((stored[above], stored[within], keys[within]))
    return [_joined(cut, parts) for cut, parts in zip(cuts, found, strict=True)]


def _joined(cut: Cut, parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Gathered:
    """One tensor's part of a cut from its stretches."""
    above, within, keys = (np.concatenate(column) for column in zip(*parts, strict=True))
    if cut.low == cut.high:  # all equal: only the first can be among the first of all tensors
        within, keys = within[: cut.need], keys[: cut.need]
    return Gathered(above, within, keys)


def resolve(cut: Cut, parts: list[Gathered | None]) -> list[np.ndarray]:
    """Settles who of those within the cut is in.

    Args:
        parts: of every tensor in order; None for those that cannot be selected. Emptied on the way, since together
            they are as large as the selection.

    Returns:
        For each tensor its selected flat indices, rising.
    """
    keys = np.concatenate([part.keys for part in parts if part] or [np.empty(0, np.int32)])
    taken = np.zeros(len(keys), dtype=bool)
    # Stable: among equal keys the earlier tensor, and within it the lower index, comes first.
    taken[np.argsort(-keys, kind="stable")[: cut.need]] = True
    out, at = [], 0
    for number, part in enumerate(parts):
        parts[number] = None
        if part is None:
            out.append(np.empty(0, np.int32))
            continue
        mine = taken[at : at + len(part.keys)]
        at += len(part.keys)
        out.append(np.sort(np.concatenate([part.above, part.within[mine]]), kind="stable"))
    return out


def _in_turn(tensors: Tensors, function: Callable[[str, Tensor, Tensor], Result]) -> Iterator[Result]:
    for name, before, after in tensors():
        yield function(name, before, after)


def _stretches(
    ranking: Ranking, include: str | None, name: str, before: Tensor, after: Tensor
) -> Iterator[tuple[int, np.ndarray]]:
    """The keys of one tensor, a stretch at a time; nothing where `include` does not admit it."""
    if include is not None and not re.search(include, name):
        return
    assert before.dtype == torch.float32, name
    assert after.dtype == torch.float32, name
    assert before.shape == after.shape, name
    first, second = before.reshape(-1), after.reshape(-1)
    for start in range(0, first.numel(), STRETCH):
        stretch = slice(start, start + STRETCH)
        yield start, ranking.keys(name, start, first[stretch], second[stretch])


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
    shapes: dict[str, tuple[int, ...]], indices: list[np.ndarray], base: str, k: float, order: str
) -> Selection:
    dense = all(
        len(found) == torch.Size(shape).numel() for found, shape in zip(indices, shapes.values(), strict=True)
    )
    kept = (
        {}
        if dense
        else {
            name: torch.from_numpy(found) for name, found in zip(shapes, indices, strict=True) if len(found)
        }
    )
    return Selection(list(shapes), shapes, kept, dense, base, k, order)
