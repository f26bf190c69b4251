"""The report's figures as inline SVG: data in, markup out. Colours come from the style sheet's classes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from allo_ray.report.axes import Frame, limits, plain, svg, ticks
from allo_ray.report.content import ModelScores
from allo_ray.report.markup import Markup, el, join, number
from allo_ray.report.wording import count, figure, interval, percent

#: Points a line is drawn with at most; a longer one is shown by the mean of each stretch.
LINE_POINTS = 240
#: From this length on, a line is drawn pale with its running mean over it.
SMOOTH_FROM = 60
#: Up to so many points a line has dots; a longer one has so many places that tell their numbers.
DOTS = 48
#: Steps of the colour scale of a heat map.
HEAT_STEPS = 12

FIFTHS = (0, 0.2, 0.4, 0.6, 0.8, 1)


def dots(scores: Sequence[ModelScores], styles: Mapping[str, str]) -> Markup:
    """Accuracy of each model on one suite: a dot with its 95 % interval, one row a model."""
    row, top, left, width = 30, 12, 116, 420
    height = top + row * len(scores) + 40
    spread = [share for score in scores for share in (score.low, score.high)]
    low, high = limits(spread)
    frame = Frame.make(
        (max(0.0, low), min(1.0, high)), (0, 1), width, height, left=left, bottom=40, top=top, right=16
    )
    xs = ticks(frame.x.low, frame.x.high, 5)
    parts: list[Markup] = [
        el("path", d=f"M{frame.x(tick):.1f} {top}V{frame.y.start:.1f}", class_="grid") for tick in xs
    ]
    parts.append(frame.axes("accuracy", xs, (), x_text=lambda share: f"{100 * share:.4g} %"))
    for index, score in enumerate(scores):
        y = top + row * (index + 0.5)
        title = (
            f"{score.label}, {score.suite}: {percent(score.accuracy)} {interval(score.low, score.high)}, "
            f"{count(score.correct)} of {count(score.n)}"
        )
        ends = f"M{frame.x(score.low):.1f} {y}H{frame.x(score.high):.1f}"
        parts.append(
            el(
                "g",
                el("title", title),
                el("text", score.label, x=left - 12, y=y + 4, class_="name end"),
                el("path", d=ends, class_="whisker"),
                el("circle", cx=frame.x(score.accuracy), cy=y, r=6) if score.n else "",
                el("path", d=f"M0 {y - row / 2}h{width}v{row}h-{width}z", class_="hit"),
                class_=styles.get(score.label, "s0"),
            )
        )
    return frame.svg(*parts, label=f"Accuracy on {scores[0].suite} with 95 % intervals")


@dataclass(frozen=True)
class Line:
    """One curve of a panel: values over steps, with the style-sheet class that colours it."""

    name: str
    ys: Sequence[float]
    style: str


def curves(
    title: str,
    steps: Sequence[float],
    lines: Sequence[Line],
    mark: tuple[float, str] | None = None,
    shares: bool = False,
    width: float = 230,
) -> Markup:
    """Lines over steps. `mark` is a level worth seeing and its name; `shares` writes y in per cent."""
    span = limits([y for line in lines for y in line.ys], (mark[0],) if mark else ())
    if shares:
        # At least a fifth of the whole, lest noise look like a trend.
        spare = max(0.0, (0.2 - (span[1] - span[0])) / 2)
        span = max(-0.02, span[0] - spare), min(1.02, span[1] + spare)
    first, last = (steps[0], steps[-1]) if steps[0] < steps[-1] else (steps[0] - 1, steps[0] + 1)
    frame = Frame.make((first, last), span, width, left=44)
    text = (lambda y: f"{100 * y:.4g} %") if shares else plain
    whole = [tick for tick in ticks(first, last, width / 60) if tick == round(tick)]
    parts = [frame.axes("step", whole, ticks(*span, 4), y_text=text)]
    if mark:
        # A line that ends at the mark would run through its name.
        ends = [y for line in lines for y in line.ys[-1:] if math.isfinite(y)]
        at_left = any(abs(frame.y(y) - frame.y(mark[0])) < 16 for y in ends)
        parts.append(frame.rule_y(*mark, at_left=at_left))
    for line in lines:
        xs, ys = _thin(steps, line.ys)
        smooth = len(ys) >= SMOOTH_FROM
        parts.append(frame.line(xs, ys, f"line {line.style}{' faint' if smooth else ''}"))
        if smooth:
            parts.append(frame.line(xs, _running_mean(ys), f"line {line.style}"))
        finite = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
        style, radius = ("hit", 6.0) if len(finite) > DOTS else (f"point {line.style}", 2.6)
        for x, y in finite[:: max(1, len(finite) // DOTS)]:
            told = el("title", f"step {x:.6g}: {line.name} {percent(y, 2) if shares else figure(y)}")
            parts.append(el("circle", told, cx=frame.x(x), cy=frame.y(y), r=radius, class_=style))
    return frame.svg(*parts, label=f"{title} by step")


def _thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    if len(xs) <= LINE_POINTS:
        return list(xs), list(ys)
    cuts = np.array_split(np.arange(len(xs)), LINE_POINTS)
    x, y = np.asarray(xs, float), np.asarray(ys, float)
    finite = [y[cut][np.isfinite(y[cut])] for cut in cuts]
    means = [float(part.mean()) if len(part) else math.nan for part in finite]
    return [float(x[cut].mean()) for cut in cuts], means


def _running_mean(ys: Sequence[float]) -> list[float]:
    """Centred, over a tenth of the line, of the finite values."""
    half = max(1, len(ys) // 20)
    out = []
    for i in range(len(ys)):
        near = [y for y in ys[max(0, i - half) : i + half + 1] if math.isfinite(y)]
        out.append(sum(near) / len(near) if near and math.isfinite(ys[i]) else math.nan)
    return out


def histogram(values: np.ndarray, u: float | None, bins: int = 40) -> Markup:
    """Share of the tokens in each stretch of P_re, on a logarithmic axis; the bars below u are highlighted."""
    counts, edges = np.histogram(np.clip(values, 0, 1), bins=bins, range=(0, 1))
    shares = counts / max(1, counts.sum())
    floor = 10.0 ** math.floor(math.log10(min((s for s in shares if s > 0), default=1e-3)) - 0.01)
    floor = max(floor, 1e-6)
    frame = Frame.make((0, 1), (floor, 1), log_y=True)
    powers = [10.0**e for e in range(round(math.log10(floor)), 1)]
    parts = [frame.axes("P_re", FIFTHS, powers, y_text=lambda y: f"{100 * y:.4g} %")]
    for share, n, low, high in zip(shares, counts, edges, edges[1:], strict=False):
        if not n:
            continue
        x, y = frame.x(low), frame.y(share)
        below = u is not None and (low + high) / 2 < u
        parts.append(
            el(
                "rect",
                el("title", f"P_re {low:.3f} to {high:.3f}: {percent(share, 2)}, {count(int(n))} tokens"),
                x=x + 0.5,
                y=y,
                width=frame.x(high) - x - 1,
                height=frame.y.start - y,
                class_="bar low" if below else "bar",
            )
        )
    if u is not None:
        parts.append(frame.rule_x(u, f"u = {u:g}"))
    return frame.svg(*parts, label="Histogram of P_re over all scored tokens")


def kept_curve(values: np.ndarray, u: float | None, kept: float | None) -> Markup:
    """Share of the tokens below each threshold: what another u would keep; the run's u is the dot."""
    grid = np.linspace(0, 1, 101)
    below = np.searchsorted(np.sort(values), grid, side="left") / max(1, len(values))
    frame = Frame.make((0, 1), (0, 1))
    quarters = (0, 0.25, 0.5, 0.75, 1)
    parts = [
        frame.axes("threshold u", FIFTHS, quarters, y_text=lambda y: f"{100 * y:g} %"),
        frame.line(list(grid), list(below), "line s1"),
    ]
    if u is not None and kept is not None:
        x, y = frame.x(u), frame.y(kept)
        text = f"u = {u:g} keeps {percent(kept)}"
        parts.append(el("path", d=f"M{x:.1f} {frame.y.start:.1f}V{y:.1f}H{frame.x.start:.1f}", class_="rule"))
        parts.append(el("circle", el("title", text), cx=x, cy=y, r=5, class_="point s2"))
        at, style = (x - 9, "tick strong end") if x > 200 else (x + 9, "tick strong")
        parts.append(el("text", text, x=at, y=y - 8 if y > 40 else y + 18, class_=style))
    return frame.svg(*parts, label="Share of tokens kept at each threshold")


def heat(
    rows: Sequence[str], columns: Sequence[str], cells: Mapping[tuple[str, str], tuple[int, int]], label: str
) -> Markup:
    """A heat map of selected / all; the colour scale runs from 0 to the largest share. Empty cells stay blank."""
    left, top, width = 34, 62, 350
    tall = min(15.0, max(4.0, 430 / max(1, len(rows))))
    wide = (width - left - 24) / max(1, len(columns))
    height = top + tall * len(rows) + 48
    shares = {key: part / whole for key, (part, whole) in cells.items() if whole}
    most = max(shares.values(), default=0.0)
    parts: list[Markup] = []
    for column, name in enumerate(columns):
        x, y = left + wide * (column + 0.5), top - 7
        turn = f"rotate(-40 {x:.1f} {y})"
        parts.append(el("text", name, x=x - 3, y=y, transform=turn, class_="tick"))
    every = max(1, math.ceil(11 / tall))
    for row, name in enumerate(rows):
        y = top + tall * row
        if row % every == 0:
            parts.append(el("text", name, x=left - 6, y=y + tall / 2 + 3.5, class_="tick end"))
        for column, module in enumerate(columns):
            if (share := shares.get((name, module))) is None:
                continue
            selected, total = cells[name, module]
            title = (
                f"layer {name}, {module}: {count(selected)} of {count(total)} neurons ({percent(share, 2)})"
            )
            parts.append(
                el(
                    "rect",
                    el("title", title),
                    x=left + wide * column,
                    y=y,
                    width=wide - 1,
                    height=tall - 1 if tall > 6 else tall,
                    class_=f"h{heat_step(share, most)}",
                )
            )
    parts.append(_heat_legend(left, top + tall * len(rows) + 16, width - left - 24, most))
    return svg(width, height, *parts, label=label)


def heat_step(share: float, most: float) -> int:
    """Which colour of the scale from 0 to `most` a share has."""
    return min(HEAT_STEPS - 1, int(share / most * HEAT_STEPS)) if most > 0 else 0


def _heat_legend(x: float, y: float, width: float, most: float) -> Markup:
    cell = width / HEAT_STEPS
    boxes = [
        el("rect", x=x + i * cell, y=y, width=cell, height=9.0, class_=f"h{i}") for i in range(HEAT_STEPS)
    ]
    ends = (
        (x, "0 %", "tick"),
        (x + width / 2, percent(most / 2), "tick mid"),
        (x + width, percent(most), "tick end"),
    )
    return join((*boxes, *(el("text", text, x=at, y=y + 22, class_=style) for at, text, style in ends)))


def bar(parts: Sequence[tuple[float, str, str]], whole: float) -> Markup:
    """A horizontal bar as wide as its column: (length, style-sheet class, title) of each part, out of `whole`."""
    at, boxes = 0.0, []
    for length, style, title in parts:
        share = 100 * length / whole if whole else 0.0
        if share > 0:
            place = {"x": f"{number(at)}%", "width": f"{number(share)}%", "height": "100%"}
            boxes.append(el("rect", el("title", title), **place, class_=style))
        at += share
    return el("svg", *boxes, class_="rowbar", aria_hidden="true")
