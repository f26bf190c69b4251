"""Attention over trees, both ways to compute it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from allo_ray.errors import UserError
from allo_ray.train.attention import ShortTrees, tree_attention
from allo_ray.train.batching import Grid, pack
from allo_ray.train.rows import Row


def tree(*ids: list[int]) -> Row:
    none = np.zeros(0, dtype=np.float32)
    prompt, chosen, rejected = (np.array(part, dtype=np.int32) for part in ids)
    return Row(0, "a", prompt, chosen, rejected, none, none, none)


@pytest.fixture
def grid() -> Grid:
    """Trees of 7, 4 and 3 tokens."""
    rows = [tree([5, 6, 7], [1, 2, 3], [4, 5, 6]), tree([5], [1, 2], [4, 5, 6]), tree([8, 9], [1, 3], [1, 2])]
    return pack(rows, "pair").grid


def heads(seed: int, count: int, tokens: int, dtype: torch.dtype) -> torch.Tensor:
    drawn = torch.randn(1, count, tokens, 8, generator=torch.Generator().manual_seed(seed))
    return (1.5 * drawn).to(dtype).requires_grad_()


def answers(attend, grid: Grid, dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients for 6 query heads over 2 key heads."""
    tokens = len(grid.cells)
    query, key, value = (heads(seed, count, tokens, dtype) for seed, count in enumerate((6, 2, 2)))
    out = attend(query, key, value)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    return [out, *torch.autograd.grad(out, (query, key, value), upstream)]


def by_sdpa(grid: Grid):
    return lambda query, key, value: tree_attention(torch.nn.Module(), query, key, value, None, grid=grid)[0]


def by_short_trees(grid: Grid):
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return ShortTrees.apply(*(part[0].transpose(0, 1) for part in (query, key, value)), grid, 8**-0.5)[
            None
        ]

    return attend


def test_short_trees_equal_torchs_attention(grid: Grid) -> None:
    for one, other in zip(
        answers(by_short_trees(grid), grid, torch.float32),
        answers(by_sdpa(grid), grid, torch.float32),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_short_trees_in_bf16_are_as_exact_as_bf16_allows(grid: Grid) -> None:
    """Against float64: within 1 % of the norm (bf16 has steps of 0.4 to 0.8 %)."""
    exact = answers(by_sdpa(grid), grid, torch.float64)
    rounded = [part.to(torch.float64) for part in answers(by_short_trees(grid), grid, torch.bfloat16)]
    for one, other in zip(rounded, exact, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.01


def test_sliding_window_counts_positions_not_places() -> None:
    """The first token of the second branch lies 4 places after the prompt's end, yet only one position."""
    grid = pack([tree([5, 6], [7, 8, 9, 9], [4, 3, 2])], "pair").grid
    query, key = (torch.randn(1, 2, 7, 4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    value = torch.eye(7)[None, None, :, :].expand(1, 2, 7, 7)
    seen = (
        tree_attention(torch.nn.Module(), query, key, value, None, grid=grid, sliding_window=2)[0][0, :, 0]
        > 0
    )
    assert seen[5].int().tolist() == [0, 1, 0, 0, 0, 1, 0]


def test_sliding_window_reaches_into_the_preamble(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a preamble of 9 tokens and a window of 4 every token sees what it sees where its tree holds all of them."""
    start = list(range(20, 29))
    rows = [tree([*start, 5, 6], [7, 8, 9], [7, 3]), tree([*start, 4], [1, 2], [2, 1, 1])]

    def outputs() -> torch.Tensor:
        packed = pack(rows, "pair")
        drawn = torch.randn(3, 40, 30, 2, 4, generator=torch.Generator().manual_seed(0))
        query, key, value = (part[packed.tokens, packed.positions].transpose(0, 1)[None] for part in drawn)
        out = tree_attention(torch.nn.Module(), query, key, value, None, grid=packed.grid, sliding_window=4)
        return out[0][0, packed.states]

    shared = outputs()
    monkeypatch.setattr("allo_ray.train.batching.SHORTEST_PREAMBLE", 100)
    torch.testing.assert_close(shared, outputs())


def test_models_whose_attention_cannot_be_built_are_refused(grid: Grid) -> None:
    few = torch.zeros(1, 1, len(grid.cells), 4)
    with pytest.raises(UserError, match="passes no keyword arguments"):
        tree_attention(torch.nn.Linear(1, 1), few, few, few, None)
    with pytest.raises(UserError, match="softcap"):
        tree_attention(torch.nn.Linear(1, 1), few, few, few, None, grid=grid, softcap=30.0)
