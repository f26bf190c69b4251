"""Section: where the selected neurons sit."""

from __future__ import annotations

from collections.abc import Mapping

from allo_ray.report import figures
from allo_ray.report.content import ReportData
from allo_ray.report.markup import Markup, el
from allo_ray.report.parts import framed, panel, section, table
from allo_ray.report.placement import Apart, Placement, place
from allo_ray.report.wording import NONE, count, percent

#: What the two selections are for.
_NAMES = {"k1": "k1 (forgetting)", "k2": "k2 (learning)"}

_MAP_CAPTION = (
    "Share of each matrix's neurons that the mask selects: a row is a layer (0 is next to the input), a "
    "column a module; each scale starts at 0. An even mask would be one colour, so look for layers or "
    "modules that stand out: there alignment changes the model most. Point at a cell for its numbers."
)
_APART_CAPTION = (
    "What is no matrix of a layer: embeddings, output head, norms, biases; those of all layers in one row. "
    "All bars share one scale. Norms hold few neurons, so look at the numbers behind a high share before "
    "reading much into it."
)


def neurons(data: ReportData) -> Markup | None:
    placed = {key: place(selection) for key, selection in data.selections.items() if selection}
    if not placed:
        return None
    maps = [
        panel(
            name,
            figures.heat(place.layers, place.modules, place.cells, f"Selected share, {name}"),
            _size(place),
        )
        for key, place in placed.items()
        if place.cells and (name := _NAMES.get(key, key))
    ]
    return section(
        "neurons",
        "Where the selected neurons sit",
        framed(_MAP_CAPTION, el("div", *maps, class_="row two")) if maps else "",
        _apart({key: {item.name: item for item in place.apart} for key, place in placed.items()}),
    )


def _size(placement: Placement) -> str:
    share = percent(placement.selected / placement.total if placement.total else None, 2)
    return f"{count(placement.selected)} of {count(placement.total)} neurons, {share}"


def _apart(found: Mapping[str, Mapping[str, Apart]]) -> Markup | str:
    names = list(dict.fromkeys(name for items in found.values() for name in items))
    if not names:
        return ""
    most = max(item.share for items in found.values() for item in items.values())
    rows = []
    for name in names:
        cells: list[object] = [name]
        for items in found.values():
            item = items.get(name)
            cells += _cells(item, most) if item else (NONE, "")
        rows.append(cells)
    head = ["tensor", *(cell for key in found for cell in (key, ""))]
    return framed(_APART_CAPTION, table(head, rows, "bars"))


def _cells(item: Apart, most: float) -> tuple[Markup, Markup]:
    title = f"{count(item.selected)} of {count(item.total)} neurons"
    if item.tensors > 1:
        title += f" in {item.tensors} tensors, from {percent(item.low, 2)} to {percent(item.high, 2)}"
    share = el("span", percent(item.share, 2), title=title)
    return share, figures.bar([(item.share, "bar work", title)], most)
