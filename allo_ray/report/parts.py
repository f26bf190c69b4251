"""What sections are made of: headings, captioned figures, tables, titled panels."""

from __future__ import annotations

from collections.abc import Sequence

from allo_ray.report.markup import Markup, el


def section(key: str, title: str, *parts: object) -> Markup:
    return el("section", el("h2", title), *parts, id=key)


def framed(caption: object, *parts: object) -> Markup:
    """A figure with the caption that says what to look for."""
    return el("figure", *parts, el("figcaption", caption))


def table(head: Sequence[object], rows: Sequence[Sequence[object]], class_: str | None = None) -> Markup:
    """A table whose first column names the row; the others are numbers. It scrolls where the page is narrow."""
    top = el("tr", *(el("th", cell, scope="col") for cell in head))
    body = [el("tr", el("th", row[0], scope="row"), *(el("td", cell) for cell in row[1:])) for row in rows]
    return el("div", el("table", el("thead", top), el("tbody", *body), class_=class_), class_="scroll")


def panel(
    title: str, picture: Markup, note: str = "", keys: Sequence[tuple[str, str]] = (), class_: str = "panel"
) -> Markup:
    """A titled drawing, one of several side by side. `keys`: name and colour class of each line in it."""
    beside = [el("span", note, class_="muted")] if note else []
    beside += [el("span", name, class_=f"key {style}") for name, style in keys]
    return el("div", el("div", el("b", title), *beside, class_="panel-title"), picture, class_=class_)
