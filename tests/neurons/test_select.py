"""Exact selection against a stable sort of all neurons, and against torch.topk."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from allo_ray.errors import UserError
from allo_ray.neurons import importance as importance_module
from allo_ray.neurons import select as module
from allo_ray.neurons.importance import Counted, Ranked, measure, rank
from allo_ray.neurons.select import select
from allo_ray.neurons.selection import Selection

SHAPES = {
    "embed": (300, 100),
    "norm": (7,),
    "layers.0.up": (57, 333),
    "layers.1.up": (57, 333),
    "one": (1, 1),
}
Model = list[tuple[str, Tensor, Tensor]]


def model(change: Callable[[Tensor], Tensor] = lambda noise: noise * 1e-3, seed: int = 0) -> Model:
    """θ0 normal, θ' = θ0 + change(normal noise)."""
    random = torch.Generator().manual_seed(seed)
    tensors = []
    for name, shape in SHAPES.items():
        before, noise = torch.randn(shape, generator=random), torch.randn(shape, generator=random)
        tensors.append((name, before, before + change(noise)))
    return tensors


def tied(noise: Tensor) -> Tensor:
    """Few distinct sizes, both signs, most of them 0: what bf16 differences look like."""
    return (noise * 0.8).round() / 1024


def exactly_tied(seed: int = 0) -> Model:
    """θ0 is 0, since adding to a normal θ0 rounds the ties apart."""
    return [
        (
            name,
            torch.zeros_like(before),
            tied(torch.randn(before.shape, generator=torch.Generator().manual_seed(n + seed))),
        )
        for n, (name, before, _) in enumerate(model())
    ]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that these small tensors have several blocks, the last one shorter, and blocks several samples."""
    monkeypatch.setattr(importance_module, "BLOCK", 1 << 12)
    monkeypatch.setattr(importance_module, "STEP", 1 << 6)


def ranked(tensors: Model) -> list[tuple[Ranked, Counted]]:
    return [
        rank(
            name,
            tuple(before.shape),
            measure(name, before, after.clone()),
            torch.empty(before.numel(), dtype=torch.int32),
        )
        for name, before, after in tensors
    ]


def locate(tensors: Model, ks: list[float], **options: Any) -> list[Selection]:
    """Selections from importances in memory."""
    found = ranked(tensors)

    def mapper(function: Callable[[Ranked], Any], names: Collection[str]) -> Iterator[Any]:
        return (function(tensor) for tensor, _ in found if tensor.name in names)

    return select([counted for _, counted in found], mapper, ks, **options)


def flat(selection: Selection) -> Tensor:
    """Positions in the concatenation of all tensors."""
    out, offset = [torch.empty(0, dtype=torch.int64)], 0
    for name in selection.names:
        if selection.dense:
            out.append(torch.arange(selection.size_of(name)) + offset)
        elif name in selection.indices:
            indices = selection.indices[name]
            assert indices.dtype == torch.int32
            assert (indices.diff() > 0).all()
            out.append(indices.long() + offset)
        offset += selection.size_of(name)
    return torch.cat(out)


def importances(tensors: Model) -> Tensor:
    return torch.cat([(after - before).abs().view(-1) for _, before, after in tensors])


def by_definition(tensors: Model, largest: bool = True) -> Tensor:
    """The definition: a stable sort, so that ties go by tensor order, then flat index."""
    return importances(tensors).sort(descending=largest, stable=True).indices


KS = [0.001, 0.05, 0.1, 0.5, 1.0]


@pytest.mark.parametrize("order", ["top", "last"])
@pytest.mark.parametrize(
    "tensors",
    [model(), exactly_tied(), [(name, before, before) for name, before, _ in model()], model(torch.sign)],
    ids=["distinct", "tied", "unchanged", "one-step"],
)
def test_equals_a_stable_sort(tensors: Model, order: str):
    """Several k in one call; "one-step" is what a single Adam step gives: all updates about equal."""
    total = sum(before.numel() for _, before, _ in tensors)
    expected = by_definition(tensors, order == "top")
    for k, selection in zip(KS, locate(tensors, KS, order=order), strict=True):
        assert selection.count == round(k * total)
        assert selection.total == total
        assert selection.order == order
        assert torch.equal(flat(selection), expected[: selection.count].sort().values)


@pytest.mark.parametrize("seed", range(3))
def test_equals_topk(seed: int):
    """The same importances as torch.topk over the concatenation gives."""
    tensors = model(seed=seed)
    values = importances(tensors)
    [selection] = locate(tensors, [0.1])
    chosen = torch.topk(values, selection.count).values
    assert torch.equal(values[flat(selection)].sort().values, chosen.sort().values)


def test_passes(monkeypatch: pytest.MonkeyPatch):
    """One pass for all k where no bin is crowded, two where values repeat; both read what lies around the cuts."""
    passes: list[str] = []

    def counted(tensors: Model) -> list[Selection]:
        passes.clear()
        found = ranked(tensors)

        def mapper(function: Any, names: Collection[str]) -> Iterator[Any]:
            passes.append(function.func.__name__)
            return (function(tensor) for tensor, _ in found)

        return select([one for _, one in found], mapper, [0.05, 0.1])

    monkeypatch.setattr(module, "CROWDED", 8)  # of few neurons an ordinary bin holds a larger share
    counted(model())
    assert passes == ["gather"]
    counted(exactly_tied())
    assert passes == ["refine", "gather"]


def test_a_selection_reads_its_own_share(monkeypatch: pytest.MonkeyPatch):
    """Of blocks of 4,096 neurons the top 5 % are read, and the samples around the last bin: under a fifth of all."""

    class Counting:
        def __init__(self, values: Tensor) -> None:
            self.values = values

        def __getitem__(self, part: slice) -> Tensor:
            read.append(part.stop - part.start)
            return self.values[part]

    read: list[int] = []
    found = ranked(model())
    lazy = [
        Ranked(tensor.name, tensor.size, Counting(tensor.importance), Counting(tensor.order), tensor.samples)
        for tensor, _ in found
    ]
    [selection] = select(
        [one for _, one in found], lambda function, names: map(function, lazy), [0.05], order="top"
    )
    assert selection.count <= sum(read) < 0.2 * selection.total


def test_mapped_over_workers():
    """Passes travel to other processes (pickled) and may finish in any order, if results come in tensor order."""
    tensors = exactly_tied()
    found = [pair for pair in ranked(tensors) if pair[0].name != "norm"]
    names = [tensor.name for tensor, _ in found]

    def mapper(function: Callable[[Ranked], Any], asked: Collection[str]) -> Iterator[Any]:
        assert list(asked) == names
        copies = [pickle.loads(pickle.dumps(function)) for _ in names]
        done = {at: copies[at](found[at][0]) for at in reversed(range(len(names)))}
        return (done[at] for at in range(len(names)))

    for mapped, alone in zip(
        select([counted for _, counted in ranked(tensors)], mapper, [0.05, 0.3], include="embed|layers|one"),
        locate(tensors, [0.05, 0.3], include="embed|layers|one"),
        strict=True,
    ):
        assert torch.equal(flat(mapped), flat(alone))
        assert mapped.names == alone.names


def test_band():
    """Ranks round(0.05 N) to round(0.2 N) of the top order."""
    for tensors in (model(), exactly_tied()):
        total = sum(before.numel() for _, before, _ in tensors)
        for low, high in ((0.05, 0.2), (0.0, 0.1), (0.9, 1.0)):
            [selection] = locate(tensors, [], order=("band", low, high))
            expected = by_definition(tensors)[round(low * total) : round(high * total)]
            assert torch.equal(flat(selection), expected.sort().values)
            assert selection.order == "band"


def test_random():
    """Exact count, the same for the same seed, another for another, nested in k, spread evenly."""
    tensors = model()
    small, large = locate(tensors, [0.1, 0.3], order="random", seed=3)
    assert (small.count, large.count) == (round(0.1 * small.total), round(0.3 * small.total))
    assert torch.equal(flat(small), flat(locate(tensors, [0.1], order="random", seed=3)[0]))
    assert not torch.equal(flat(small), flat(locate(tensors, [0.1], order="random", seed=4)[0]))
    assert set(flat(small).tolist()) <= set(flat(large).tolist())
    # 3,000 expected of 30,000 in the embedding; standard deviation 52
    assert 2700 < small.count_of("embed") < 3300
    assert 900 < np.mean(small.indices["embed"].numpy() < 10_000) * small.count_of("embed") < 1100


def test_include():
    """k counts the admitted neurons only; the other tensors stay in the selection, with none."""
    tensors = model()
    [selection] = locate(tensors, [0.25], include=r"layers\.1\.")
    assert list(selection.indices) == ["layers.1.up"]
    assert selection.count == round(0.25 * 57 * 333)
    assert selection.names == list(SHAPES)
    assert selection.count_of("embed") == 0
    alone = [tensor for tensor in tensors if tensor[0] == "layers.1.up"]
    assert torch.equal(
        selection.indices["layers.1.up"].long(), by_definition(alone)[: selection.count].sort().values
    )
    [whole] = locate(tensors, [1.0], include="norm")
    assert (whole.count, whole.dense) == (7, False)


def test_all_is_dense():
    [selection] = locate(model(), [1.0])
    assert selection.dense
    assert selection.count == selection.total
    assert not selection.indices


def test_signed_zero_and_denormals():
    """-0.0 is as unimportant as 0.0; the smallest denormal is more important than either."""
    before = torch.zeros(4)
    after = torch.tensor([-0.0, 1e-45, 0.0, -1e-45])
    [selection] = locate([("w", before, after)], [0.75])
    assert selection.indices["w"].tolist() == [0, 1, 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(bad: float):
    tensors = model()
    tensors[2][2].view(-1)[18_000] = bad
    with pytest.raises(UserError, match=r"layers\.0\.up: the update of neuron 18000 is not finite"):
        locate(tensors, [0.1])


@pytest.mark.parametrize(
    ("ks", "options", "message"),
    [
        ([1.5], {}, "has to lie between 0 and 1"),
        ([1e-9], {}, "selects none of 67,970 neurons"),
        ([0.1], {"include": "nothing"}, "no tensor's name matches"),
        ([0.1], {"include": "("}, "no regular expression"),
        ([], {"order": ("band", 0.2, 0.2)}, "holds none"),
    ],
)
def test_told_to_the_user(ks: list[float], options: dict, message: str):
    with pytest.raises(UserError, match=message):
        locate(model(), ks, **options)
