"""Ranked importances of a whole model in safetensors files, made and read a tensor at a time.

A shard holds of each of its tensors `<tensor>.importance` float32 [N_t], `<tensor>.order` int32 [N_t] and
`<tensor>.samples` float32 [N_t / 2048, rounded up]; see `importance.Ranked`. The index holds `<tensor>.bins` int32 and
`<tensor>.counts` int64, see `importance.Counted`, and in its header: base (fingerprint of the base folder) and tensors
(name, shape and shard of each, in the model's order).

Shapes: N_t neurons of tensor t.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from allo_ray.neurons.importance import STEP, Counted, Ranked, measure, rank
from allo_ray.neurons.masters import Masters
from allo_ray.neurons.ranges import open_file
from allo_ray.neurons.selection import open_safetensors
from allo_ray.neurons.stream import write_safetensors

FORMAT, VERSION = "allo_ray.importance", "1"
INDEX = "index.safetensors"
Result = TypeVar("Result")


@dataclass(frozen=True)
class RankedFiles:
    """What the index says.

    Attributes:
        counted: every tensor, in the model's order.
        shards: file of each tensor, by its name.
        base: fingerprint of the base folder.
    """

    counted: list[Counted]
    shards: dict[str, str]
    base: str

    def save(self, folder: Path) -> None:
        """Writes the index beside the shards."""
        tensors: dict[str, np.ndarray] = {}
        for one in self.counted:
            tensors[f"{one.name}.bins"] = one.bins
            tensors[f"{one.name}.counts"] = one.counts
        told = [[one.name, list(one.shape), self.shards[one.name]] for one in self.counted]
        header = {"format": FORMAT, "version": VERSION, "base": self.base, "tensors": json.dumps(told)}
        save_file(tensors, folder / INDEX, metadata=header)

    @classmethod
    def load(cls, folder: str) -> RankedFiles:
        """Reads the index in a folder or behind a URL.

        Raises:
            UserError: there is none, or it is of another version.
        """
        header, file = open_safetensors(f"{folder}/{INDEX}", FORMAT, VERSION, "the index of importances")
        told = json.loads(header["tensors"])
        counted = [
            Counted(
                name,
                tuple(shape),
                file.get_tensor(f"{name}.bins").numpy(),
                file.get_tensor(f"{name}.counts").numpy(),
            )
            for name, shape, _ in told
        ]
        return cls(counted, {name: shard for name, _, shard in told}, header["base"])


def write_shard(path: Path, before: Masters, after: Masters, names: Sequence[str]) -> list[Counted]:
    """Measures and ranks some tensors; memory: two tensors, and what sorting a block takes.

    Args:
        before, after: θ0 and θ', of one architecture.

    Raises:
        UserError: an update is not finite.
    """
    layout: dict[str, tuple[torch.dtype, Sequence[int]]] = {}
    for name in names:
        size = torch.Size(before.shapes[name]).numel()
        samples = len(range(0, size, STEP))
        layout[f"{name}.importance"] = (torch.float32, [size])
        layout[f"{name}.order"] = (torch.int32, [size])
        layout[f"{name}.samples"] = (torch.float32, [samples])
    counted: list[Counted] = []
    held: dict[str, Tensor] = {}

    def read(
        key: str,
    ) -> Tensor:  # asked for in the layout's order: all three of a tensor, then the next one's
        name, _, part = key.rpartition(".")
        if part == "importance":
            start = before.read(name)
            importance = measure(name, start, after.read(name))
            order = start.view(-1).view(torch.int32)  # its values are used up
            ranked, found = rank(name, before.shapes[name], importance, order)
            counted.append(found)
            held.update(importance=importance, order=order, samples=ranked.samples)
        return held.pop(part)

    write_safetensors(path, layout, read, {"format": FORMAT, "version": VERSION})
    return counted


def map_shard(function: Callable[[Ranked], Result], path: str, names: Collection[str]) -> list[Result]:
    """A function of each of these tensors of one shard, a file or URL."""
    return [function(tensor) for tensor in _ranked(path, names)]


def _ranked(path: str, names: Collection[str]) -> Iterator[Ranked]:
    file: Any = open_file(path)
    for name in names:
        importance = file.get_slice(f"{name}.importance")
        order, samples = file.get_slice(f"{name}.order"), file.get_tensor(f"{name}.samples")
        yield Ranked(name, importance.get_shape()[0], importance, order, samples)
