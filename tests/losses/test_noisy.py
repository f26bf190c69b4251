"""Eq. 8: which tokens of a rejected response are dropped."""

from __future__ import annotations

import pytest
import torch

from allo_ray.losses.noisy import keep


def kept(ratios: list[list[float]], v: float) -> list[list[bool]]:
    """q of several sequences in one call."""
    sequence = torch.repeat_interleave(
        torch.arange(len(ratios)), torch.tensor([len(part) for part in ratios])
    )
    flat = torch.tensor([ratio for part in ratios for ratio in part])
    return [
        part.tolist() for part in keep(flat, sequence, len(ratios), v).split([len(part) for part in ratios])
    ]


@pytest.mark.parametrize(
    ("v", "dropped"), [(0.0, 0), (0.19, 0), (0.2, 1), (0.39, 1), (0.5, 2), (0.8, 4), (1.0, 5)]
)
def test_floor_of_v_n_highest(v: float, dropped: int):
    """floor(v * 5) of five distinct ratios go, the highest first."""
    ratios = [0.1, 5.0, -3.0, 2.0, 0.7]
    highest = sorted(ratios, reverse=True)[:dropped]
    assert kept([ratios], v) == [[ratio not in highest for ratio in ratios]]


def test_v_n_that_floats_miss():
    """0.29 * 100 is 28.999999999999996 in floats; 29 tokens are meant."""
    [mine] = kept([list(range(100))], 0.29)
    assert mine.count(False) == 29


def test_first_step_drops_nothing():
    """All ratios equal: the tie at the cut takes all of them, whatever v below 1."""
    assert kept([[0.0] * 10, [0.0] * 3], 0.5) == [[True] * 10, [True] * 3]


def test_tie_at_the_cut_drops_none_of_the_tied():
    """floor(0.5 * 6) = 3: the highest (9) goes; ranks 2 to 4 are tied across the cut, so all three stay."""
    assert kept([[9.0, 4.0, 4.0, 4.0, 1.0, 0.0]], 0.5) == [[False, True, True, True, True, True]]


def test_tie_above_the_cut_goes():
    """floor(0.5 * 4) = 2: both tied ones are above the cut."""
    assert kept([[4.0, 1.0, 4.0, 0.0]], 0.5) == [[False, True, False, True]]


def test_short_response_beside_a_long_one():
    """The share is of a response's own tokens: 1 of 2, and 50 of 100, not 51 of the batch's 102."""
    long = [float(ratio) for ratio in range(100)]
    short, other = kept([[-7.0, -5.0], long], 0.5)
    assert short == [True, False]
    assert other == [ratio < 50 for ratio in range(100)]


def test_interleaved_sequences_and_empty_ones():
    """Tokens need not lie together; a sequence without tokens disturbs nobody."""
    ratios = torch.tensor([1.0, 10.0, 2.0, 20.0])
    sequence = torch.tensor([0, 2, 0, 2])
    assert keep(ratios, sequence, 3, 0.5).tolist() == [True, True, False, False]
    assert keep(torch.empty(0), torch.empty(0, dtype=torch.long), 2, 0.5).tolist() == []
