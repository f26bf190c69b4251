"""A selection: which neurons of a model are trained, as sorted flat indices for each tensor.

Shapes: N_t neurons of tensor t, K_t selected ones, N and K their sums. A neuron is one scalar of one parameter
tensor; its flat index is its row-major position. Tensors carry their Hugging Face state dict names, tied weights once
by the name of the input embedding, in the order of `model.named_parameters()`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from allo_ray.errors import UserError
from allo_ray.neurons.encoding import decode, encode
from allo_ray.neurons.ranges import open_file

FORMAT, VERSION = "allo_ray.selection", "1"


@dataclass(frozen=True)
class Selection:
    """K of a model's N neurons.

    Attributes:
        names: every parameter tensor of the model, in its order, selected or not.
        shapes: shape of each of them.
        indices: int32 (int64 from 2^31 neurons on) [K_t], strictly rising; a tensor without a selected neuron
            is absent.
        dense: every neuron is selected; `indices` is then empty.
        base: fingerprint of the model that the importances were measured from ("" where that has no meaning).
        k: the share that was asked for, in [0, 1].
        order: how neurons were ranked: "top", "last", "random", "band", or "all".
    """

    names: list[str]
    shapes: dict[str, tuple[int, ...]]
    indices: dict[str, Tensor] = field(default_factory=dict)
    dense: bool = False
    base: str = ""
    k: float = 1.0
    order: str = "all"

    @classmethod
    def all(cls, names: Sequence[str], shapes: Mapping[str, Sequence[int]], base: str = "") -> Selection:
        """Every neuron of the named tensors: dense training."""
        return cls(list(names), {name: tuple(shapes[name]) for name in names}, dense=True, base=base)

    @classmethod
    def of_model(cls, model: torch.nn.Module, base: str = "") -> Selection:
        """Every neuron of a model: dense training."""
        parameters = dict(floating_parameters(model))
        return cls.all(
            list(parameters), {name: tuple(weight.shape) for name, weight in parameters.items()}, base
        )

    def size_of(self, name: str) -> int:
        """N_t."""
        return torch.Size(self.shapes[name]).numel()

    def count_of(self, name: str) -> int:
        """K_t."""
        if self.dense:
            return self.size_of(name)
        return len(self.indices[name]) if name in self.indices else 0

    @property
    def total(self) -> int:
        """N."""
        return sum(self.size_of(name) for name in self.names)

    @property
    def count(self) -> int:
        """K."""
        return sum(self.count_of(name) for name in self.names)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with, for each tensor, the smaller of a bitmask and delta-coded indices."""
        tensors, encodings = {}, {}
        for name, indices in self.indices.items():
            encodings[name], encoded = encode(indices.numpy(), self.size_of(name))
            tensors[name] = torch.from_numpy(encoded)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "base": self.base,
            "k": repr(self.k),
            "order": self.order,
            "dense": str(int(self.dense)),
            "count": str(self.count),
            "total": str(self.total),
            "tensors": json.dumps(
                [[name, list(self.shapes[name]), encodings.get(name)] for name in self.names]
            ),
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> Selection:
        """Reads what `save` wrote.

        Raises:
            UserError: there is no such file, or it is no selection of this version.
        """
        header, file = open_safetensors(path, FORMAT, VERSION, "a selection")
        tensors = json.loads(header["tensors"])
        shapes = {name: tuple(shape) for name, shape, _ in tensors}
        indices = {}
        for name, shape, encoding in tensors:
            if encoding is not None:
                size = torch.Size(shape).numel()
                decoded = torch.from_numpy(decode(encoding, file.get_tensor(name).numpy(), size))
                indices[name] = decoded.to(index_dtype(size))
        selection = cls(
            names=list(shapes),
            shapes=shapes,
            indices=indices,
            dense=header["dense"] == "1",
            base=header["base"],
            k=float(header["k"]),
            order=header["order"],
        )
        if selection.count != int(header["count"]):
            raise UserError(
                f"{path}: holds {selection.count} neurons, its header says {header['count']}. Make it anew."
            )
        return selection


def index_dtype(size: int) -> torch.dtype:
    """int32 where it can address `size` neurons, else int64."""
    return torch.int32 if size < 2**31 else torch.int64


def floating_parameters(model: torch.nn.Module) -> Iterable[tuple[str, torch.nn.Parameter]]:
    """The model's floating-point parameters in its order, tied ones once, by their first name."""
    return ((name, weight) for name, weight in model.named_parameters() if weight.is_floating_point())


def open_safetensors(path: str | Path, kind: str, version: str, told: str):
    """Opens a safetensors file of this program.

    Args:
        path: file or URL.
        kind: value that its header must give as "format".
        version: value that its header must give as "version".
        told: what the file should be, in words, for the message.

    Returns:
        Its header and the open file, whose tensors are read when asked for.

    Raises:
        UserError: it cannot be read, or it is something else.
    """
    try:
        file = open_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read as {told} ({error}). Check the path, or make the file anew."
        ) from None
    header = file.metadata() or {}
    if header.get("format") != kind or header.get("version") != version:
        raise UserError(
            f"{path}: expected {told} ({kind} version {version}), found "
            f"{header.get('format', 'a foreign safetensors file')} version {header.get('version', 'none')}."
        )
    return header, file
