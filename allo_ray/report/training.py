"""Section: loss, margin, log-ratios, accuracy and kept share of each trained stage, by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import pyarrow as pa

from allo_ray.report import figures
from allo_ray.report.content import ReportData
from allo_ray.report.figures import Line
from allo_ray.report.markup import Markup, el
from allo_ray.report.parts import framed, panel, section
from allo_ray.report.wording import amount, count, figure

#: Loss of a pair, or of a negative, under two equal models.
LN2 = math.log(2)

_CAPTION = (
    "One point an optimiser step; long runs show their running mean over the pale line. Look for a loss "
    "that starts at ln 2 ≈ 0.693 where two equal models are compared (anything else is a bug) and then "
    "falls; for a margin that grows because the chosen log-ratio holds while the rejected one sinks, not "
    "because both sink; and for a kept share that never falls below 1 − v."
)


def training(data: ReportData) -> Markup | None:
    blocks = [_stage(stage, metrics) for stage, metrics in data.curves.items() if metrics.num_rows]
    return section("training", "Training", framed(_CAPTION, *blocks)) if blocks else None


def values(metrics: pa.Table, column: str) -> list[float]:
    """A column of METRICS; null is nan."""
    return [math.nan if value is None else float(value) for value in metrics[column].to_pylist()]


def known(ys: Sequence[float]) -> list[float]:
    return [y for y in ys if math.isfinite(y)]


def dropping(metrics: pa.Table) -> list[float]:
    """Share of the tokens that carry weight, by step; all nan where the stage never drops one."""
    kept = values(metrics, "kept")
    return kept if any(share < 1 for share in known(kept)) else [math.nan] * len(kept)


def _stage(stage: str, metrics: pa.Table) -> Markup:
    steps, loss = values(metrics, "step"), values(metrics, "loss")
    facts = [f"{count(len(steps))} steps"]
    if tokens := known(values(metrics, "tokens")):
        facts.append(f"{count(int(sum(tokens)))} tokens")
    if found := known(loss):
        facts.append(f"loss {figure(found[0])} → {figure(found[-1])}")
    if speed := known(values(metrics, "tokens_per_second")):
        facts.append(f"{count(round(median(speed)))} tokens/s")
    if peak := known(values(metrics, "peak_rss")):
        facts.append(f"peak memory {amount(max(peak))}")
    if peak := known(values(metrics, "peak_gpu")):
        facts.append(f"on the GPU {amount(max(peak))}")
    starts_equal = bool(found) and abs(found[0] - LN2) < 0.02
    charts = (
        ("loss", [Line("loss", loss, "s1")], (LN2, "ln 2") if starts_equal else None, False),
        ("margin", [Line("margin", values(metrics, "margin"), "s3")], (0.0, ""), False),
        (
            "log-ratio",
            [
                Line("chosen", values(metrics, "chosen_logratio"), "s1"),
                Line("rejected", values(metrics, "rejected_logratio"), "s2"),
            ],
            (0.0, ""),
            False,
        ),
        ("pairs ranked right", [Line("accuracy", values(metrics, "accuracy"), "s4")], (0.5, "chance"), True),
        ("kept tokens", [Line("kept", dropping(metrics), "s5")], None, True),
    )
    panels = []
    for column, (title, lines, mark, shares) in enumerate(charts, start=1):
        present = [line for line in lines if known(line.ys)]
        if present:
            picture = figures.curves(title, steps, present, mark, shares)
            keys = [(line.name, line.style) for line in present if len(lines) > 1]
            # The same quantity stands in the same column of every stage.
            panels.append(panel(title, picture, keys=keys, class_=f"panel c{column}"))
    heading = el("h3", stage, " ", el("small", " · ".join(facts)))
    return el("div", heading, el("div", *panels, class_="row"), class_="stage")
