"""Section: rejected responses: every token with its P_re as background and its q as an underline."""

from __future__ import annotations

import re
from difflib import SequenceMatcher

from allo_ray.report.content import Negative, ReportData
from allo_ray.report.markup import Markup, el, join
from allo_ray.report.parts import section
from allo_ray.report.wording import count

#: Negatives shown, tokens of each, and characters of each text beside it: what keeps the file small.
SHOWN, TOKENS, CHARACTERS = 20, 400, 1500
#: Steps of the colour scale below u.
STEPS = 5


def negatives(data: ReportData) -> Markup | None:
    if not data.negatives:
        return None
    with_p_re = any(len(negative.p_re) for negative in data.negatives)
    with_q = any(len(negative.q) for negative in data.negatives)
    lead = ["Rejected responses, one box a token. "]
    if with_p_re:
        lead.append(
            "Warm colours: P_re below u, forgotten (the stronger, the lower); cool: fine as it is. Look for "
            "warm colour where the response goes wrong and where the rewrite differs (its changes are "
            "underlined). "
        )
    if with_q:
        lead.append(
            f"Purple line below: q = 0, dropped from the learning loss, by the ratios of {data.q_model}. "
        )
    lead.append("Point at a token for its numbers.")
    if len(data.negatives) > SHOWN:
        lead.append(f" The first {SHOWN} of {count(len(data.negatives))}.")
    return section(
        "negatives",
        "Negatives, token by token",
        el("p", *lead, class_="lead"),
        legend(data.u, with_p_re, with_q),
        *(_card(index, negative, data.u) for index, negative in enumerate(data.negatives[:SHOWN], start=1)),
    )


def shade(p_re: float, u: float | None) -> str:
    """Class of a token's background: `ok` from the threshold on (r = 0), else t0 (just below u) to t4 (near 0)."""
    threshold = 1.0 if u is None else u
    if p_re >= threshold or threshold <= 0:
        return "ok"
    return f"t{min(STEPS - 1, int((1 - p_re / threshold) * STEPS))}"


def legend(u: float | None, with_p_re: bool, with_q: bool) -> Markup:
    threshold = 1.0 if u is None else u
    ends = [threshold * (1 - step / STEPS) for step in range(STEPS + 1)]
    boxes = []
    if with_p_re:
        boxes.append(el("span", f"P_re ≥ {threshold:.4g}", class_="tok ok"))
        for step, (high, low) in enumerate(zip(ends, ends[1:], strict=False)):
            boxes.append(el("span", f"{low:.2f}–{high:.2f}", class_=f"tok t{step}"))
    if with_q:
        boxes.append(el("span", "dropped by v (q = 0)", class_="tok d"))
    return el("p", *boxes, class_="legend")


def _card(index: int, negative: Negative, u: float | None) -> Markup:
    facts = [f"{len(negative.tokens)} tokens"]
    if len(negative.p_re) and u is not None:
        facts.append(f"{sum(p < u for p in negative.p_re)} kept by u")
    if len(negative.q):
        facts.append(f"{sum(q == 0 for q in negative.q)} dropped by v")
    shown = [_token(negative, position, u) for position in range(min(TOKENS, len(negative.tokens)))]
    if len(negative.tokens) > TOKENS:
        shown.append(el("span", f" … {count(len(negative.tokens) - TOKENS)} more tokens", class_="muted"))
    beside = [_text("Chosen", _cut(negative.chosen))]
    if negative.reference is not None:
        beside.insert(0, _text("Reference", _cut(negative.reference)))
    if negative.rewrite is not None:
        beside.insert(0, _text("Rewrite", _edits("".join(negative.tokens), negative.rewrite)))
    return el(
        "article",
        el(
            "header",
            el("b", f"{index}", class_="muted"),
            el("span", _cut(negative.prompt), class_="text", dir="auto"),
            el("span", " · ".join(facts), class_="facts muted"),
        ),
        el("p", *shown, class_="tokens", dir="auto"),
        el("div", *beside, class_="beside"),
        class_="negative",
    )


def _token(negative: Negative, position: int, u: float | None) -> Markup:
    token, classes, told = negative.tokens[position], ["tok"], [f"token {position + 1}"]
    if len(negative.p_re):
        p_re = negative.p_re[position]
        classes.append(shade(p_re, u))
        told.append(f"P_re {p_re:.4f}" + (f", r = {int(p_re < u)}" if u is not None else ""))
    if len(negative.q):
        told.append(f"q = {negative.q[position]:g}")
        if negative.q[position] == 0:
            classes.append("d")
    return el("span", token.replace("\n", "↵\n") or "∅", class_=" ".join(classes), title="\n".join(told))


def _text(title: str, text: Markup) -> Markup:
    return el("div", el("h4", title), el("p", text, class_="text", dir="auto"))


def _cut(text: str) -> Markup:
    """The text, or its beginning and how much is left out."""
    if len(text) <= CHARACTERS:
        return join([text])
    return join(
        [text[:CHARACTERS], el("span", f" … {count(len(text) - CHARACTERS)} more characters", class_="muted")]
    )


def _edits(rejected: str, rewrite: str) -> Markup:
    """The rewrite with the words marked that the teacher changed or put in."""
    before = re.findall(r"\w+|\s+|[^\w\s]", rejected[: 2 * CHARACTERS])
    after = re.findall(r"\w+|\s+|[^\w\s]", rewrite[:CHARACTERS])
    parts: list[object] = []
    for kind, _, _, start, stop in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        text = "".join(after[start:stop])
        parts.append(el("mark", text) if kind in ("replace", "insert") and text.strip() else text)
    if len(rewrite) > CHARACTERS:
        parts.append(el("span", f" … {count(len(rewrite) - CHARACTERS)} more characters", class_="muted"))
    return join(parts)
