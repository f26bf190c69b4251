"""Numbers in words."""

from __future__ import annotations

import math

import pytest

from allo_ray.report import wording
from allo_ray.report.wording import NBSP


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.00031, "p = 0.00031"),
        (0.00099, "p = 0.00099"),
        (0.0001, "p = 0.00010"),
        (0.00009, "p < 0.0001"),
        (0.0, "p < 0.0001"),
        (0.049, "p = 0.049"),
        (0.42, "p = 0.42"),
        (1.0, "p = 1.00"),
        (math.nan, "p –"),
    ],
)
def test_p_values(p: float, text: str) -> None:
    assert wording.p_value(p).replace(NBSP, " ") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.97, "10 s"),
        (59.7, "1 min 00 s"),
        (141, "2 min 21 s"),
        (3599.6, "1 h 00 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert wording.duration(seconds) == text


def test_halves_are_rounded_as_a_reader_does() -> None:
    """0.6125 - 0.44 = 0.1725: 61.3 % - 44.0 % = 17.3 points."""
    assert wording.percent(0.6125) == f"61.3{NBSP}%"
    assert wording.points(0.6125 - 0.44) == "+17.3"
    assert wording.points(-0.1725) == "−17.3"
    assert wording.interval(0.5647, 0.6603) == "[56.5, 66.0]"
    assert wording.percent(None) == wording.percent(math.nan) == "–"


def test_sizes() -> None:
    assert [wording.amount(x) for x in (999, 1000, 2.1e9, 5e15)] == ["999 B", "1.0 kB", "2.1 GB", "5000.0 TB"]
