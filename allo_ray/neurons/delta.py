"""Sparse deltas: what a trained stage leaves behind.

A delta holds the float32 masters of the neurons that were trained, over a named base. Masters, not differences: a
trained value is given back bit for bit, and of two deltas the later one simply wins.

The file (safetensors): `<tensor>.values` float32 [K_t] and `<tensor>.indices` int32 [K_t] (int64 from 2^31 neurons
on; flat, row-major, strictly rising; absent in a dense delta). Its header's metadata: format, version, base
(fingerprint of the base folder), dense, count (K), total (N), tensors (names and shapes of the whole model, in order).

Shapes: N_t neurons of tensor t, of which a delta holds K_t.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from allo_ray.errors import UserError
from allo_ray.neurons.selection import Selection, index_dtype, open_safetensors
from allo_ray.neurons.stream import write_safetensors

FORMAT, VERSION = "allo_ray.delta", "1"


@dataclass(frozen=True)
class Delta:
    """Masters of some of a model's neurons; tensors are read, or made, one at a time when asked for.

    Attributes:
        names, shapes: every parameter tensor of the model, in its order.
        base: fingerprint of the base folder; "" where nobody gave it.
        dense: every neuron of the model is held, and there are no indices.
        counts: K_t by name; tensors without one are absent.
        entries: name -> (indices [K_t] or None where dense, values float32 [K_t]).
        origin: what a message calls it.
    """

    names: list[str]
    shapes: dict[str, tuple[int, ...]]
    base: str
    dense: bool
    counts: dict[str, int]
    entries: Callable[[str], tuple[Tensor | None, Tensor]]
    origin: str = "the delta"

    def count_of(self, name: str) -> int:
        """K_t."""
        return self.counts.get(name, 0)

    @property
    def count(self) -> int:
        """K."""
        return sum(self.counts.values())

    @property
    def total(self) -> int:
        """N."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def values(self, name: str) -> Tensor:
        """float32 [K_t]."""
        return self.entries(name)[1]

    def indices(self, name: str) -> Tensor | None:
        """[K_t], flat; None where dense."""
        return self.entries(name)[0]

    def put(self, name: str, weight: Tensor) -> None:
        """Writes the values of one tensor into a weight of any dtype, in place."""
        if not self.count_of(name):
            return
        indices, values = self.entries(name)
        flat = weight.view(-1)
        if indices is None:
            flat.copy_(values)
        else:
            flat.index_copy_(0, indices.to(flat.device, torch.int64), values.to(flat.device, flat.dtype))

    def save(self, path: str | Path) -> None:
        """Writes the file, tensor by tensor."""
        layout: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
        for name, count in self.counts.items():
            layout[f"{name}.values"] = (torch.float32, [count])
            if not self.dense:
                layout[f"{name}.indices"] = (index_dtype(torch.Size(self.shapes[name]).numel()), [count])
        header = {
            "format": FORMAT,
            "version": VERSION,
            "base": self.base,
            "dense": str(int(self.dense)),
            "count": str(self.count),
            "total": str(self.total),
            "tensors": json.dumps([[name, list(self.shapes[name])] for name in self.names]),
        }

        def read(key: str) -> Tensor:
            name, _, part = key.rpartition(".")
            indices, values = self.entries(name)
            if part == "values":
                return values
            assert indices is not None
            return indices.to(layout[key][0])

        write_safetensors(path, layout, read, header)


def from_values(values: Mapping[str, Tensor], selection: Selection, base: str | None = None) -> Delta:
    """A delta in memory.

    Args:
        values: float32 [K_t] by name, for every tensor with a selected neuron.
        base: fingerprint of the base folder; the selection's by default.
    """

    def entries(name: str) -> tuple[Tensor | None, Tensor]:
        return selection.indices.get(name), values[name].detach().view(-1)

    counts = {name: selection.count_of(name) for name in selection.names if selection.count_of(name)}
    for name, count in counts.items():
        assert values[name].numel() == count, f"{name}: {values[name].numel()} values for {count} neurons"
    return Delta(
        selection.names,
        selection.shapes,
        selection.base if base is None else base,
        selection.dense,
        counts,
        entries,
    )


def save(
    path: str | Path, values: Mapping[str, Tensor], selection: Selection, base: str | None = None
) -> None:
    """Writes the trained values of a selection; see `from_values`."""
    from_values(values, selection, base).save(path)


def load(path: str | Path) -> Delta:
    """Opens a delta file; its tensors are read when asked for.

    Raises:
        UserError: it cannot be read, or is no delta of this version.
    """
    header, file = open_safetensors(path, FORMAT, VERSION, "a delta")
    shapes = {name: tuple(shape) for name, shape in json.loads(header["tensors"])}
    dense = header["dense"] == "1"
    kept = set(file.keys())

    def entries(name: str) -> tuple[Tensor | None, Tensor]:
        return None if dense else file.get_tensor(f"{name}.indices"), file.get_tensor(f"{name}.values")

    counts = {
        name: file.get_slice(f"{name}.values").get_shape()[0] for name in shapes if f"{name}.values" in kept
    }
    return Delta(list(shapes), shapes, header["base"], dense, counts, entries, origin=str(path))


def opened(deltas: Sequence[str | Path | Delta]) -> list[Delta]:
    """Opens those that are paths.

    Raises:
        UserError: two of them are over different bases.
    """
    out = [delta if isinstance(delta, Delta) else load(delta) for delta in deltas]
    named = [delta for delta in out if delta.base]
    for delta in named[1:]:
        if delta.base != named[0].base:
            raise UserError(
                f"{delta.origin}: made over the base {delta.base}, while {named[0].origin} was made over "
                f"{named[0].base}. Only deltas over the same base go together."
            )
    return out


def apply(delta: Delta, state: Mapping[str, Tensor]) -> None:
    """Writes a delta's values into tensors of any dtype, in place.

    Args:
        state: contiguous weights by name, such as `dict(model.named_parameters())`.

    Raises:
        UserError: a tensor is missing or has another shape.
    """
    for name in delta.counts:
        if name not in state or tuple(state[name].shape) != delta.shapes[name]:
            raise UserError(
                f"{delta.origin}: holds {name} of shape {delta.shapes[name]}, which the model does not have. "
                "Apply it to the model it was trained from."
            )
        delta.put(name, state[name].data)


def stack(deltas: Sequence[str | Path | Delta]) -> Delta:
    """One delta that does what several do one after the other; a later one wins.

    Raises:
        UserError: there is none, or they are over different bases or architectures.
    """
    layers = opened(deltas)
    if not layers:
        raise UserError("no deltas to stack. Name at least one delta file.")
    first = layers[0]
    for layer in layers[1:]:
        if layer.shapes != first.shapes:
            raise UserError(
                f"{layer.origin} and {first.origin} are of different models. Stack deltas of one model."
            )
    dense = any(layer.dense for layer in layers)

    def union(name: str) -> Tensor:
        parts = [
            indices
            for layer in layers
            if layer.count_of(name) and (indices := layer.indices(name)) is not None
        ]
        return torch.cat(parts).unique()

    def entries(name: str) -> tuple[Tensor | None, Tensor]:
        size = torch.Size(first.shapes[name]).numel()
        whole = torch.empty(size)
        for layer in layers:
            layer.put(name, whole)
        indices = None if dense else union(name)
        return indices, whole if indices is None else whole.index_select(0, indices)

    counts = {
        name: torch.Size(first.shapes[name]).numel() if dense else len(union(name))
        for name in first.names
        if any(layer.count_of(name) for layer in layers)
    }
    if dense and len(counts) < len(first.names):
        raise UserError(f"{first.origin}: a dense delta lacks tensors. Make it anew.")
    base = next((layer.base for layer in layers if layer.base), "")
    return Delta(first.names, first.shapes, base, dense, counts, entries, "the stacked delta")
