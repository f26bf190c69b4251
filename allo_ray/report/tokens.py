"""Section: which tokens of the rejected responses count, by u and by v."""

from __future__ import annotations

import numpy as np

from allo_ray.report import figures
from allo_ray.report.content import ReportData
from allo_ray.report.figures import Line
from allo_ray.report.markup import Markup, el
from allo_ray.report.parts import framed, panel, section
from allo_ray.report.training import dropping, known, values
from allo_ray.report.wording import count, percent

#: The stage that drops tokens by v.
_LEARN = "learn"

_U_CAPTION = (
    "P_re is the reward model's probability of each token of a rejected response, given problem, solution "
    "and prediction; tokens with P_re < u (orange) are forgotten. Look for two heaps, a sharp one at 1 "
    "(tokens that are fine) and a low one (tokens that do harm), with u between them. Where the right-hand "
    "curve is flat, another u would change little. The left-hand scale is logarithmic."
)
_V_CAPTION = (
    "Share of the rejected tokens that carry weight at each step, for the stages that drop any. Learning drops at "
    "most the share v of each response, and nothing at its first step, where all ratios are equal: look for a start "
    "at 100 % and a quick fall. Forgetting keeps what u keeps, so its line only wavers with the batches."
)


def tokens(data: ReportData) -> Markup | None:
    parts = [part for part in (_by_u(data), _by_v(data)) if part is not None]
    return section("tokens", "Which tokens count", *parts) if parts else None


def _by_u(data: ReportData) -> Markup | None:
    if data.p_re is None:
        return None
    scores = np.asarray(data.p_re, np.float64)
    scores = scores[np.isfinite(scores)]
    if not len(scores):
        return None
    caption = _U_CAPTION
    if data.u is not None and data.kept_by_u is not None:
        kept = (
            f"u = {data.u:g} keeps {percent(data.kept_by_u)} of {count(len(scores))} tokens for forgetting. "
        )
        caption = kept + caption
    panels = (
        panel("P_re of the rejected tokens", figures.histogram(scores, data.u)),
        panel("what any u would keep", figures.kept_curve(scores, data.u, data.kept_by_u)),
    )
    return framed(caption, el("div", *panels, class_="row two"))


def _by_v(data: ReportData) -> Markup | None:
    panels = []
    for stage, metrics in data.curves.items():
        kept = dropping(metrics)
        if not known(kept):
            continue
        mark = None
        if stage == _LEARN and data.v is not None:
            mark = (1 - data.v, f"1 − v = {1 - data.v:.4g}")
        picture = figures.curves(
            "kept tokens", values(metrics, "step"), [Line("kept", kept, "s5")], mark, True, 350
        )
        panels.append(panel(f"kept by step, {stage}", picture))
    return framed(_V_CAPTION, el("div", *panels, class_="row two")) if panels else None
