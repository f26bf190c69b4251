"""Where selected neurons sit: the tensors of a state dict arranged as layer x module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_LAYER = re.compile(r"^(?P<stem>.*?)\.(?P<layer>\d+)\.(?P<module>.+)$")
_APART = re.compile(r"norm|(^|[._])ln(_|\d|\.|$)|\bbias$")


@dataclass(frozen=True)
class Apart:
    """Tensors that are no matrix of a layer: embeddings, head, norms, biases; those of all layers in one row."""

    name: str
    tensors: int
    selected: int
    total: int
    #: Smallest and largest share of one tensor.
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.selected / self.total if self.total else 0.0


@dataclass(frozen=True)
class Placement:
    """(selected, total) of each layer's matrices by (layer, module), and everything else in `apart`."""

    layers: list[str]
    modules: list[str]
    cells: dict[tuple[str, str], tuple[int, int]]
    apart: list[Apart]
    selected: int
    total: int


def place(selection: Mapping[str, tuple[int, int]]) -> Placement:
    """Arranges tensor name -> (selected, total). Experts of one layer share a cell, as `experts.*.up_proj`."""
    cells: dict[tuple[str, str], tuple[int, int]] = {}
    apart: dict[str, list[tuple[int, int]]] = {}
    for name, (selected, total) in selection.items():
        match = _LAYER.match(name)
        short = name.removesuffix(".weight").removeprefix("model.")
        if match is None:
            apart.setdefault(short, []).append((selected, total))
            continue
        module = re.sub(r"(?<=\.)\d+(?=\.)", "*", match["module"])
        if _APART.search(module):
            apart.setdefault(f"{module.removesuffix('.weight')}, all layers", []).append((selected, total))
            continue
        key = match["layer"], module.removesuffix(".weight").rpartition("self_attn.")[2].rpartition("mlp.")[2]
        before = cells.get(key, (0, 0))
        cells[key] = before[0] + selected, before[1] + total
    return Placement(
        layers=sorted({layer for layer, _ in cells}, key=int),
        modules=list(dict.fromkeys(module for _, module in cells)),
        cells=cells,
        apart=[_apart(name, tensors) for name, tensors in apart.items()],
        selected=sum(selected for selected, _ in selection.values()),
        total=sum(total for _, total in selection.values()),
    )


def _apart(name: str, tensors: list[tuple[int, int]]) -> Apart:
    shares = [selected / total for selected, total in tensors if total] or [0.0]
    return Apart(
        name, len(tensors), sum(s for s, _ in tensors), sum(t for _, t in tensors), min(shares), max(shares)
    )
