"""Figures of a campaign: parallel coordinates, objective against one parameter, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from allo_ray.report.axes import Frame, Scale, limits, plain, svg, ticks
from allo_ray.report.figures import HEAT_STEPS, heat_step
from allo_ray.report.markup import Markup, el, join
from allo_ray.report.trials import CampaignData, Metric, Parameter, Trial, Value, front
from allo_ray.report.wording import figure, percent


def worded(value: Value, metric: Metric | None = None) -> str:
    """A parameter's or metric's value in words."""
    if isinstance(value, (bool, str)):
        return str(value)
    return percent(value) if metric is not None and metric.share else figure(value)


def told(trial: Trial, data: CampaignData) -> str:
    """A trial in one line, for those who point at it."""
    measured = [data.objective, *([data.against] if data.against else [])]
    parts = [f"{m.name} {worded(trial.metrics[m.name], m)}" for m in measured if m.name in trial.metrics]
    parts += [f"{name} = {worded(value)}" for name, value in trial.values.items()]
    return f"trial {trial.number}: " + ", ".join(parts) + (", broke a constraint" if trial.broke else "")


def shades(trials: Sequence[Trial], metric: Metric) -> dict[int, int]:
    """Trial number -> step of the colour scale, from the worst (a third up, still visible) to the best."""
    if not trials:
        return {}
    values = [trial.metrics[metric.name] * (1 if metric.maximise else -1) for trial in trials]
    low, high = min(values), max(values)
    lift = HEAT_STEPS // 3
    steps = [heat_step(value - low, (high - low) or 1.0) for value in values]
    return {
        trial.number: lift + step * (HEAT_STEPS - 1 - lift) // (HEAT_STEPS - 1)
        for trial, step in zip(trials, steps, strict=True)
    }


def _places(
    parameter: Parameter, start: float, stop: float
) -> tuple[Mapping[Value, float] | Scale, list[tuple[float, str]]]:
    """How values map to coordinates, and the ticks as (coordinate, label)."""
    if parameter.choices:
        gap = (stop - start) / (len(parameter.choices) + 1)
        at = {choice: start + gap * (index + 1) for index, choice in enumerate(parameter.choices)}
        return at, [(place, worded(choice)) for choice, place in at.items()]
    scale = Scale(parameter.low, parameter.high, start, stop, log=parameter.log)
    inner = (
        _powers(parameter.low, parameter.high) if parameter.log else ticks(parameter.low, parameter.high, 4)
    )
    room = 0.12 * abs(stop - start)
    marks = [mark for mark in inner if min(abs(scale(mark) - start), abs(scale(mark) - stop)) > room]
    return scale, [
        (scale(mark), plain(float(f"{mark:.3g}"))) for mark in (parameter.low, *marks, parameter.high)
    ]


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten between the ends; where there are fewer than two, three times these as well."""
    tens = [10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    inside = [x for x in tens if low < x < high]
    return inside if len(inside) > 1 else [x for ten in tens for x in (ten, 3 * ten) if low < x < high]


def _place(places: Mapping[Value, float] | Scale, value: Value) -> float:
    return places(float(value)) if isinstance(places, Scale) else places[value]


def parallel(data: CampaignData) -> Markup:
    """One line a trial across one axis a parameter, and the objective's at the right; darker is better."""
    shade = shades(data.measured(data.objective), data.objective)
    trials = sorted(data.measured(data.objective), key=lambda trial: shade[trial.number])
    width, height, top, base = 900, 300, 42, 272
    names = [*(parameter.name for parameter in data.parameters), data.objective.name]
    xs = [60 + (width - 130) * index / max(1, len(names) - 1) for index in range(len(names))]
    goal = Scale(*limits([trial.metrics[data.objective.name] for trial in trials]), base, top)
    parts: list[Markup] = []
    axes = [_places(parameter, base, top) for parameter in data.parameters]
    for trial in trials:
        points = [
            (x, _place(places, trial.values[parameter.name]))
            for x, parameter, (places, _) in zip(xs, data.parameters, axes, strict=False)
            if parameter.name in trial.values
        ]
        points.append((xs[-1], goal(trial.metrics[data.objective.name])))
        mark = " best" if trial.number == data.best else " broke" if trial.broke else ""
        parts.append(
            el(
                "path",
                el("title", told(trial, data)),
                d="M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points),
                class_=f"thread g{shade[trial.number]}{mark}",
            )
        )
    marks = [found for _, found in axes]
    marks.append([(goal(tick), worded(tick, data.objective)) for tick in ticks(goal.low, goal.high, 4)])
    for x, name, found in zip(xs, names, marks, strict=True):
        parts.append(el("path", d=f"M{x:.1f} {top}V{base}", class_="rail"))
        parts.append(el("text", name, x=x, y=top - 20, class_="name mid"))
        parts += [el("text", text, x=x + 7, y=y + 3.5, class_="tick halo") for y, text in found]
    return svg(width, height, *parts, label="Parallel coordinates of all trials")


def against_parameter(data: CampaignData, parameter: Parameter) -> Markup:
    """The objective over one parameter: a dot a trial, the best one ringed, the start model as a dashed line."""
    trials = [trial for trial in data.measured(data.objective) if parameter.name in trial.values]
    values = [trial.metrics[data.objective.name] for trial in trials]
    span = limits(values, () if data.start is None else (data.start,))
    frame = Frame.make((0, 1), span, 300, left=48)
    places, marks = _places(parameter, frame.x.start, frame.x.stop)
    parts = [frame.axes("", (), ticks(*span, 4), y_text=lambda y: _axis(y, data.objective))]
    parts += [el("text", text, x=at, y=frame.y.start + 15, class_="tick mid") for at, text in marks]
    scale = f"{parameter.name}, logarithmic" if parameter.log else parameter.name
    parts.append(
        el("text", scale, x=(frame.x.start + frame.x.stop) / 2, y=frame.y.start + 30, class_="tick mid")
    )
    if data.start is not None:
        parts.append(frame.rule_y(data.start, "start model"))
    for trial in trials:
        x, y = _place(places, trial.values[parameter.name]), frame.y(trial.metrics[data.objective.name])
        parts.append(_spot(trial, data, x, y))
    return frame.svg(*parts, label=f"{data.objective.name} against {parameter.name}")


def trade(data: CampaignData, against: Metric) -> Markup:
    """Both metrics of every trial, and the front of those that no other beats in both."""
    trials = data.measured(data.objective, against)
    best = front(trials, data.objective, against)
    xs = limits([trial.metrics[against.name] for trial in trials])
    ys = limits(
        [trial.metrics[data.objective.name] for trial in trials], () if data.start is None else (data.start,)
    )
    frame = Frame.make(xs, ys, 460, 260, left=52)
    parts = [
        frame.axes(
            against.name,
            ticks(*xs, 5),
            ticks(*ys, 5),
            x_text=lambda x: _axis(x, against),
            y_text=lambda y: _axis(y, data.objective),
        )
    ]
    if data.start is not None:
        parts.append(frame.rule_y(data.start, "start model"))
    corners = [(frame.x(t.metrics[against.name]), frame.y(t.metrics[data.objective.name])) for t in best]
    if corners:
        steps = [f"M{corners[0][0]:.1f} {corners[0][1]:.1f}"]
        steps += [f"H{x:.1f}V{y:.1f}" for x, y in corners[1:]]
        parts.append(el("path", d="".join(steps), class_="line s2"))
    on_front = {trial.number for trial in best}
    for trial in trials:
        x, y = frame.x(trial.metrics[against.name]), frame.y(trial.metrics[data.objective.name])
        parts.append(_spot(trial, data, x, y, "s2" if trial.number in on_front else None))
    return frame.svg(*parts, label=f"{data.objective.name} against {against.name}, with the Pareto front")


def _axis(value: float, metric: Metric) -> str:
    return f"{100 * value:.4g} %" if metric.share else plain(value)


def _spot(trial: Trial, data: CampaignData, x: float, y: float, style: str | None = None) -> Markup:
    chosen = trial.number == data.best
    style = style or ("s0" if trial.broke else "s1")
    classes = f"spot {style}{' best' if chosen else ''}"
    return join(
        [el("circle", el("title", told(trial, data)), cx=x, cy=y, r=6.0 if chosen else 4.0, class_=classes)]
    )
