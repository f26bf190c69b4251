"""Intervals and tests, against numbers worked out by hand or by another way."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.statistics import paired_p_value, wilson_interval


def test_wilson_by_hand() -> None:
    """8 of 10, z = 1.96: centre (0.8 + 0.19207)/1.38415 = 0.71674, spread
    1.96 * sqrt(0.016 + 0.0096036)/1.38415 = 0.22657. So 0.4902 to 0.9433, as in textbooks."""
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.49016, abs=1e-4)
    assert high == pytest.approx(0.94332, abs=1e-4)


def test_wilson_at_the_ends() -> None:
    """None of n right: the upper end is z² / (n + z²), with n = 10: 3.8415 / 13.8415 = 0.27753."""
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert wilson_interval(10, 10) == pytest.approx((1 - 0.27753, 1.0), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@given(st.integers(1, 2000), st.data())
def test_wilson_solves_its_equation(n: int, data: st.DataObject) -> None:
    """Both ends p satisfy |share - p| = z sqrt(p (1 - p) / n); between them lies the share."""
    correct = data.draw(st.integers(0, n))
    share = correct / n
    low, high = wilson_interval(correct, n)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(share - end) == pytest.approx(
                1.959964 * math.sqrt(end * (1 - end) / n), rel=1e-4, abs=1e-9
            )


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),  # two tails of one path in 2^5
        (6, 0, 2 / 64),
        (8, 1, 2 * (1 + 9) / 512),
        (10, 2, 2 * (1 + 12 + 66) / 4096),
    ],
)
def test_paired_p_value_by_hand(wins: int, losses: int, p: float) -> None:
    assert paired_p_value(wins, losses) == pytest.approx(p)
    assert paired_p_value(losses, wins) == pytest.approx(p)


@given(st.integers(0, 300), st.integers(0, 300))
def test_paired_p_value_is_a_probability(wins: int, losses: int) -> None:
    assert 0 < paired_p_value(wins, losses) <= 1
    assert paired_p_value(wins + 1, 0) == pytest.approx(min(1.0, 2.0**-wins), rel=1e-9)
