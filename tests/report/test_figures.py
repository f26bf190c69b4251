"""Scales, ticks, and what single figures draw."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allo_ray.report import figures
from allo_ray.report.axes import Scale, limits, plain, ticks
from allo_ray.report.content import ModelScores
from allo_ray.report.figures import Line


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(-6.3, 1.9, 4) == [-5, 0]
    assert ticks(0.31, 0.7, 4) == [0.4, 0.5, 0.6, 0.7]
    assert ticks(1, 24, 4) == [10, 20]
    assert ticks(3, 3) == [3]


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e6), st.integers(2, 10))
def test_ticks_of_any_span(low: float, width: float, about: int) -> None:
    found = ticks(low, low + width, about)
    step = found[1] - found[0] if len(found) > 1 else 0
    assert len(found) <= about + 2
    assert all(
        low - 1e-3 * width - abs(low) * 1e-9 <= tick <= low + width * 1.001 + abs(low) * 1e-9
        for tick in found
    )
    assert all(b - a == pytest.approx(step, rel=1e-3) for a, b in zip(found, found[1:], strict=False))


def test_scale_maps_ends_and_pins_what_lies_outside() -> None:
    scale = Scale(10, 20, 100, 0)
    assert [scale(x) for x in (10, 15, 20, 5, 25)] == [100, 50, 0, 100, 0]
    log = Scale(0.01, 1, 0, 100, log=True)
    assert [round(log(x), 6) for x in (0.01, 0.1, 1, 0)] == [0, 50, 100, 0]


def test_limits_skip_what_is_no_number() -> None:
    low, high = limits([1, math.nan, 3, math.inf], (0,))
    assert low < 0 < 3 < high
    assert limits([]) == (-1, 1)
    assert limits([2, 2]) == (1.9, 2.1)


def test_tick_labels() -> None:
    assert [plain(x) for x in (0.0, -5.0, 0.25, 1e-5, 2e7)] == ["0", "−5", "0.25", "1.0e−05", "2.0e+07"]


def test_a_line_breaks_where_a_value_is_missing() -> None:
    ys = [1.0, 2.0, math.nan, 2.0, 1.0]
    svg = figures.curves("loss", [1, 2, 3, 4, 5], [Line("loss", ys, "s1")])
    path = re.search(r'<path d="([^"]*)" class="line s1">', svg)
    assert path is not None
    assert path[1].count("M") == 2
    assert svg.count("<circle") == 4
    assert "NaN" not in svg
    assert "step 2: loss 2" in svg


def test_a_long_line_keeps_its_mean() -> None:
    """1,000 points alternating 0 and 1: every drawn point lies at the mean, 0.5, within one value's weight."""
    ys = [float(i % 2) for i in range(1000)]
    svg = figures.curves("loss", list(range(1, 1001)), [Line("loss", ys, "s1")])
    shown = [float(x) for x in re.findall(r": loss ([\d.]+)</title>", svg)]
    assert len(shown) > 20
    assert all(0.39 < y < 0.61 for y in shown)


def test_histogram_counts_every_token_and_marks_u() -> None:
    values = np.array([0.0, 0.01, 0.5, 0.94, 0.96, 1.0, 1.0])
    svg = figures.histogram(values, 0.95)
    assert sum(int(n) for n in re.findall(r", ([\d,]+) tokens</title>", svg)) == len(values)
    assert "u = 0.95" in svg
    # Bars at 0, 0.5 and 0.925-0.95 lie below u; those from 0.95 on do not.
    assert svg.count('class="bar low"') == 3
    assert svg.count('class="bar"') == 2


def test_kept_curve_puts_the_dot_at_u() -> None:
    svg = figures.kept_curve(np.array([0.2, 0.4, 0.6, 0.8]), 0.5, 0.5)
    assert "u = 0.5 keeps 50.0\u00a0%" in svg
    assert "<circle" not in figures.kept_curve(np.array([0.2]), None, None)


def test_heat_steps_span_the_scale() -> None:
    assert [figures.heat_step(x, 0.1) for x in (0, 0.05, 0.1)] == [0, 6, 11]
    assert figures.heat_step(0, 0) == 0


def test_dots_stand_in_for_each_model_and_stay_inside() -> None:
    scores = [ModelScores("a", "s", 0, 10, 0, 0.3), ModelScores("b", "s", 10, 10, 0.7, 1)]
    svg = figures.dots(scores, {"a": "s0", "b": "s3"})
    assert "a, s: 0.0\u00a0% [0.0, 30.0], 0 of 10" in svg
    xs = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg)]
    assert len(xs) == 2
    assert 116 <= min(xs) < max(xs) <= 420


def test_a_bar_is_cut_by_length() -> None:
    svg = figures.bar([(1, "bar start", "s"), (2, "bar work", "w"), (0, "bar", "none")], 4)
    assert re.findall(r'x="([\d.]+)%" width="([\d.]+)%"', svg) == [("0", "25"), ("25", "50")]
    assert "<rect" not in figures.bar([(1, "bar", "x")], 0)
