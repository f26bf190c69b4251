"""`render_campaign`: a campaign over the method's thresholds as one HTML file."""

from __future__ import annotations

from allo_ray.report import figures
from allo_ray.report.campaign_figures import against_parameter, parallel, trade, worded
from allo_ray.report.markup import Markup, el
from allo_ray.report.page import page
from allo_ray.report.parts import framed, panel, section, table
from allo_ray.report.trials import CampaignData, Trial, front
from allo_ray.report.wording import NONE, count, duration, percent

#: Rows of the table of trials.
LISTED = 100

_SPACE_CAPTION = (
    "One line a trial: where it crosses an axis is the value it had there; the last axis is what came out. The "
    "better, the stronger the colour; the best trial is thick, dashed ones broke a constraint. Look for strong "
    "lines that pass an axis close together: that value matters. Where strong and pale lines mix, it does not."
)
_IMPORTANCE_CAPTION = (
    "How much of the differences between trials each parameter explains. Look for short bars: those fields "
    "may stay at their preset in the next search. With few trials the order of similar bars means nothing."
)
_EACH_CAPTION = (
    "What came out over each parameter; the other parameters vary too, hence the scatter. Look for an edge "
    "or a hump, and for a best trial at the border of the space: then the space is too narrow. The ring is "
    "the best trial, grey dots broke a constraint."
)
_FRONT_CAPTION = (
    "Each dot is a trial; the orange ones are the front: no trial is better in both. Look for the bend of "
    "the line, where more of one begins to cost much of the other."
)


def render_campaign(data: CampaignData) -> str:
    """The whole page. Save it as UTF-8."""
    body = {
        "space": ("Space", _space(data)),
        "parameters": ("Parameters", _parameters(data)),
        "front": ("Front", _front(data)),
        "cost": ("Cost", _cost(data)),
        "trials": ("Trials", _trials(data)),
        "best": ("Best config", _best(data)),
    }
    return page(data.name, _header(data), body)


def saved(data: CampaignData) -> tuple[float, float]:
    """Seconds of compute spent on stages, and seconds that as many independent runs would have spent."""
    spent = sum(stage.ran * stage.seconds for stage in data.stages)
    return spent, sum((stage.ran + stage.reused) * stage.seconds for stage in data.stages)


def _header(data: CampaignData) -> Markup:
    best, metric = data.trial(data.best), data.objective
    if best is None:
        verdict, tone = "No trial has finished yet.", "unsure"
    else:
        value = best.metrics[metric.name]
        verdict = f"Trial {best.number}: {metric.name} {worded(value, metric)}"
        better = data.start is not None and (value > data.start) == metric.maximise and value != data.start
        tone = "good" if better else "unsure"
        if data.start is not None:
            verdict += f" (start model {worded(data.start, metric)})"
    finished = sum(trial.state == "finished" for trial in data.trials)
    spent, alone = saved(data)
    tiles = [("trials finished", f"{count(finished)} of {count(len(data.trials))}")]
    if alone:
        tiles += [
            ("compute of independent runs", percent(spent / alone)),
            ("compute saved", duration(alone - spent)),
        ]
    meta = [
        data.created.strftime("%d %B %Y, %H:%M").lstrip("0"),
        data.model,
        f"ran {duration(data.wall_seconds)}",
    ]
    choice = ", ".join(f"{name} = {worded(value)}" for name, value in best.values.items()) if best else ""
    return el(
        "header",
        el("p", " · ".join(meta), class_="meta"),
        el("h1", data.name),
        el(
            "div", el("p", verdict, class_="verdict"), el("p", choice, class_="finding"), class_=f"box {tone}"
        ),
        el("div", *(_tile(name, value) for name, value in tiles), class_="tiles"),
        class_="top",
    )


def _tile(name: str, value: str) -> Markup:
    return el("div", el("small", name), el("b", value), class_="tile")


def _space(data: CampaignData) -> Markup | None:
    if not data.measured(data.objective) or not data.parameters:
        return None
    drawing = el("div", parallel(data), class_="scroll wide-figure")
    return section("space", "The search", framed(_SPACE_CAPTION, drawing))


def _parameters(data: CampaignData) -> Markup | None:
    parts = []
    if data.importance:
        most = max(data.importance.values())
        rows = [
            (name, figures.bar([(share, "bar work", f"{name}: {percent(share)}")], most), percent(share))
            for name, share in sorted(data.importance.items(), key=lambda item: -item[1])
        ]
        parts.append(framed(_IMPORTANCE_CAPTION, table(["parameter", "importance", ""], rows, "bars times")))
    if data.measured(data.objective) and data.parameters:
        panels = [panel(item.name, against_parameter(data, item)) for item in data.parameters]
        parts.append(framed(_EACH_CAPTION, el("div", *panels, class_="row")))
    return section("parameters", "What each parameter does", *parts) if parts else None


def _front(data: CampaignData) -> Markup | None:
    if data.against is None or not data.measured(data.objective, data.against):
        return None
    rows = [
        (
            f"trial {trial.number}",
            worded(trial.metrics[data.objective.name], data.objective),
            worded(trial.metrics[data.against.name], data.against),
            *(
                worded(trial.values[item.name]) if item.name in trial.values else NONE
                for item in data.parameters
            ),
        )
        for trial in front(data.measured(data.objective, data.against), data.objective, data.against)
    ]
    head = ["on the front", data.objective.name, data.against.name, *(item.name for item in data.parameters)]
    title = f"{data.objective.name} against {data.against.name}"
    drawing = el("div", panel(title, trade(data, data.against)), class_="row two")
    return section("front", "Gain against distance", framed(_FRONT_CAPTION, drawing), table(head, rows))


def _cost(data: CampaignData) -> Markup | None:
    if not data.stages:
        return None
    spent, alone = saved(data)
    most = max((stage.ran + stage.reused) * stage.seconds for stage in data.stages)
    rows: list[tuple[object, ...]] = []
    for stage in data.stages:
        ran, reused = stage.ran * stage.seconds, stage.reused * stage.seconds
        bar = figures.bar(
            [
                (ran, "bar work", f"{stage.name}: ran {count(stage.ran)} times, {duration(ran)}"),
                (
                    reused,
                    "bar saved",
                    f"{stage.name}: reused {count(stage.reused)} times, {duration(reused)} saved",
                ),
            ],
            most,
        )
        rows.append((stage.name, bar, count(stage.ran), count(stage.reused), duration(ran), duration(reused)))
    rows.append(("sum", "", "", "", el("b", duration(spent)), el("b", duration(alone - spent))))
    caption = (
        "Compute of each stage over all trials: what ran, and what the store gave back instead. "
        f"{count(len(data.trials))} independent runs would have taken {duration(alone)}; sharing brought it "
        f"to {percent(spent / alone if alone else None)} of that. Look for long blue bars: these stages are "
        "what a further trial costs."
    )
    key = el("span", el("span", "ran", class_="key s1"), " ", el("span", "saved", class_="key s0"))
    head = ["stage", key, "ran", "reused", "time", "saved"]
    return section("cost", "Cost, and what sharing saved", framed(caption, table(head, rows, "bars times")))


def _trials(data: CampaignData) -> Markup | None:
    if not data.trials:
        return None
    metrics = [data.objective, *([data.against] if data.against else [])]

    def rank(trial: Trial) -> float:
        value = trial.metrics.get(data.objective.name)
        return float("inf") if value is None else -value if data.objective.maximise else value

    rows = [
        (
            trial.number,
            *(
                worded(trial.metrics[item.name], item) if item.name in trial.metrics else NONE
                for item in metrics
            ),
            *(
                worded(trial.values[item.name]) if item.name in trial.values else NONE
                for item in data.parameters
            ),
            duration(trial.seconds),
            trial.state + (", broke a constraint" if trial.broke else ""),
        )
        for trial in sorted(data.trials, key=rank)[:LISTED]
    ]
    head = ["trial", *(item.name for item in (*metrics, *data.parameters)), "time", "state"]
    notes = []
    if data.constraints:
        notes.append(f"Constraints: {', '.join(data.constraints)}.")
    if len(data.trials) > LISTED:
        notes.append(f"The best {LISTED} of {count(len(data.trials))}.")
    return section(
        "trials", "All trials", table(head, rows), el("p", " ".join(notes), class_="lead") if notes else ""
    )


def _best(data: CampaignData) -> Markup | None:
    if not data.best_config:
        return None
    return section(
        "best",
        "The best config",
        el("p", "Save it as a file and give it to `allo align --config`, as it is."),
        el("pre", data.best_config),
    )
