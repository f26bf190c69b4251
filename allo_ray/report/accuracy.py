"""Section: accuracy of every model on every suite, and the paired comparisons."""

from __future__ import annotations

from collections.abc import Mapping

from allo_ray.report import figures
from allo_ray.report.content import Divergence, ReportData
from allo_ray.report.markup import Markup, el, join
from allo_ray.report.parts import framed, panel, section, table
from allo_ray.report.wording import NONE, count, figure, interval, p_value, percent, points

_CAPTION = (
    "Dots are accuracies, lines their 95 % intervals. Look for an aligned model whose dot lies right of the "
    "start model's interval on the first suite and that has not moved left on the others. Overlapping "
    "intervals do not decide: the models answer the same questions, and the paired test below uses that."
)


def accuracy(data: ReportData, styles: Mapping[str, str]) -> Markup | None:
    """`styles`: model label -> colour class."""
    if not data.models:
        return None
    panels = []
    for suite in data.suites:
        scores = [score for score in data.models if score.suite == suite]
        panels.append(panel(suite, figures.dots(scores, styles)))
    return section(
        "accuracy",
        "Accuracy",
        _scores(data, styles),
        el("p", _distance(data), class_="muted") if data.divergences else "",
        framed(_CAPTION, el("div", *panels, class_="row two")),
        _comparisons(data),
    )


def _scores(data: ReportData, styles: Mapping[str, str]) -> Markup:
    rows = []
    for label in data.labels:
        cells: list[object] = [el("span", el("i", class_=f"dot {styles[label]}"), label, class_="model")]
        for suite in data.suites:
            score = data.score(label, suite)
            if score is None:
                cells.append(NONE)
                continue
            note = f"{interval(score.low, score.high)} · {count(score.correct)}/{count(score.n)}"
            cells.append(join([el("b", percent(score.accuracy)), el("small", note)]))
        if data.divergences:
            cells.append(_moved(data.divergences.get(label)))
        rows.append(cells)
    head = ["model", *data.suites, *(["KL from SFT, nats"] if data.divergences else [])]
    return table(head, rows, "scores")


def _moved(found: Divergence | None) -> Markup | str:
    if found is None or found.mean is None:
        return NONE
    error = NONE if found.standard_error is None else figure(found.standard_error)
    return join([el("b", figure(found.mean)), el("small", f"± {error} · n {count(found.n)}")])


def _distance(data: ReportData) -> str:
    words = (
        "KL from SFT: how far a model has moved, the mean over the SFT model's own samples of the log-ratio of the "
        "two models, with its standard error; nats for a whole response. Of two models with equal accuracy the "
        "closer one has changed less that nobody asked for."
    )
    if data.drawn:
        words += f" The samples were drawn at {data.drawn}, so compare the figures with each other alone."
    return words


def _comparisons(data: ReportData) -> Markup | str:
    if not data.comparisons:
        return ""
    rows = [
        (f"{item.a} against {item.b}", item.suite, points(item.gain), p_value(item.p))
        for item in data.comparisons
    ]
    head = ["models", "suite", "gain, points", "two-sided p"]
    return join([el("h3", "Paired comparisons"), table(head, rows, "left2")])
