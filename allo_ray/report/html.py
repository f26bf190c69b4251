"""`render`: a finished run as one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

from collections.abc import Mapping

from allo_ray.report.accuracy import accuracy
from allo_ray.report.content import Comparison, ReportData
from allo_ray.report.costs import costs, reproduce
from allo_ray.report.markup import Markup, el, join
from allo_ray.report.negatives import negatives
from allo_ray.report.neurons import neurons
from allo_ray.report.page import page
from allo_ray.report.tokens import tokens
from allo_ray.report.training import training
from allo_ray.report.wording import duration, p_value, percent, points

#: Below this two-sided p a difference is called one.
SIGNIFICANT = 0.05
#: Colour classes of models other than the start and the headline model.
_OTHERS = ("s1", "s2", "s4", "s5", "s6")


def render(data: ReportData) -> str:
    """The whole page. Save it as UTF-8."""
    styles = model_styles(data)
    body = {
        "accuracy": ("Accuracy", accuracy(data, styles)),
        "training": ("Training", training(data)),
        "neurons": ("Neurons", neurons(data)),
        "tokens": ("Tokens", tokens(data)),
        "negatives": ("Negatives", negatives(data)),
        "costs": ("Time and rows", costs(data)),
        "reproduce": ("Reproduce", reproduce(data)),
    }
    return page(data.name, _header(data, styles), body)


def model_styles(data: ReportData) -> dict[str, str]:
    """Model label -> colour class, the same in every figure: grey is the start model, green the verdict's."""
    first = data.comparisons[0] if data.comparisons else None
    fixed = {first.b: "s0", first.a: "s3"} if first else {}
    rest = [label for label in data.labels if label not in fixed]
    return fixed | {label: _OTHERS[index % len(_OTHERS)] for index, label in enumerate(rest)}


def verdict(data: ReportData) -> str:
    """The report in one sentence, such as 'ALLO 61.2 % vs SFT 44.0 %, p = 0.00031'."""
    if not data.comparisons:
        return "No two models were compared in this run."
    first = data.comparisons[0]
    return (
        f"{_scored(data, first.a, first.suite)} vs {_scored(data, first.b, first.suite)}, {p_value(first.p)}"
    )


def finding(comparison: Comparison) -> tuple[str, str]:
    """(colour class, what the comparison shows)."""
    moved = f"{points(comparison.gain)} points on {comparison.suite}"
    if not comparison.p < SIGNIFICANT:
        return "unsure", f"{moved}: within what chance gives (p is not below {SIGNIFICANT:g})."
    if comparison.gain > 0:
        return "good", f"{moved}: better than {comparison.b}."
    return "bad", f"{moved}: worse than {comparison.b}."


def _scored(data: ReportData, label: str, suite: str) -> str:
    score = data.score(label, suite)
    return f"{label} {percent(score.accuracy)}" if score else label


def _header(data: ReportData, styles: Mapping[str, str]) -> Markup:
    created = data.created.strftime("%d %B %Y, %H:%M").lstrip("0")
    ran = sum(stage.seconds for stage in data.stages if not stage.cached)
    told = [created, data.model, *([f"ran {duration(ran)}"] if ran else [])]
    tone, words = finding(data.comparisons[0]) if data.comparisons else ("unsure", "")
    tiles = []
    if data.suites:
        tiles = [
            el(
                "div",
                el("small", join([el("i", class_=f"dot {styles[label]}"), label])),
                el("b", percent(score.accuracy)),
                class_="tile",
            )
            for label in data.labels
            if (score := data.score(label, data.suites[0])) is not None
        ]
    return el(
        "header",
        el("p", " · ".join(told), class_="meta"),
        el("h1", data.name),
        el(
            "div",
            el("p", verdict(data), class_="verdict"),
            el("p", words, class_="finding"),
            class_=f"box {tone}",
        ),
        el("div", *tiles, class_="tiles") if tiles else "",
        class_="top",
    )
