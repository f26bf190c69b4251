"""The float32 values of a model that is stored as a base folder and deltas over it, read tensor by tensor.

Shapes: N_t neurons of tensor t.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import Tensor

from allo_ray.errors import UserError
from allo_ray.neurons.delta import Delta, opened
from allo_ray.neurons.ranges import open_file
from allo_ray.neurons.selection import index_dtype
from allo_ray.store import local_path

#: Names and shapes of a model's floating-point parameters: first name -> all names of that parameter.
Parameters = dict[str, list[tuple[str, tuple[int, ...]]]]


class StoredModel:
    """A Hugging Face folder's weights: which tensors the model has, in its order, and each of them when asked for.

    Args:
        folder: folder, or URL of one, of whose weights only the tensors asked for are read.
        parameters: those of the same architecture, where they are known; making them out takes seconds.
    """

    def __init__(self, folder: str | Path, parameters: Parameters | None = None) -> None:
        self.folder = str(folder).rstrip("/")
        if parameters is not None:
            self.parameters = parameters

    @cached_property
    def parameters(self) -> Parameters:
        from transformers import AutoConfig, AutoModelForCausalLM

        told = local_path(f"{self.folder}/config.json").parent
        config = AutoConfig.from_pretrained(told, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        groups: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
        for name, weight in model.named_parameters(remove_duplicate=False):
            if weight.is_floating_point():
                groups.setdefault(id(weight), []).append((name, tuple(weight.shape)))
        return {group[0][0]: group for group in groups.values()}

    @cached_property
    def names(self) -> list[str]:
        """As `model.named_parameters()` gives them: its order, tied weights once."""
        return list(self.parameters)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: group[0][1] for name, group in self.parameters.items()}

    @cached_property
    def first_names(self) -> dict[str, str]:
        """Every name of a parameter -> the name by which it counts (differs for tied weights)."""
        return {name: first for first, group in self.parameters.items() for name, _ in group}

    @cached_property
    def files(self) -> list[str]:
        """The folder's weight files."""
        files, root = fsspec.core.url_to_fs(self.folder)
        index = f"{root}/model.safetensors.index.json"
        if files.exists(index):
            return sorted(set(json.loads(files.cat_file(index))["weight_map"].values()))
        inside = files.ls(root, detail=False) if files.isdir(root) else []
        found = sorted(path.rpartition("/")[-1] for path in inside if path.endswith(".safetensors"))
        if not found:
            raise UserError(
                f"{self.folder}: no safetensors weights here. Save the model with `save_pretrained`."
            )
        return found

    def open(self, file: str) -> Any:
        """A weight file, whose tensors are read when asked for."""
        return open_file(f"{self.folder}/{file}")

    @cached_property
    def _places(self) -> dict[str, Any]:
        return {name: handle for handle in map(self.open, self.files) for name in handle.keys()}  # noqa: SIM118

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored.

        Raises:
            UserError: the files have no tensor of this name or shape.
        """
        for told, _ in self.parameters[name]:
            if told in self._places:
                tensor = self._places[told].get_tensor(told)
                if tuple(tensor.shape) != self.shapes[name]:
                    break
                return tensor
        raise UserError(
            f"{self.folder}: its config.json promises a tensor {name} of shape {self.shapes[name]}, which its files "
            "do not hold. Load the model with transformers and save it again with `save_pretrained`; architectures "
            "whose files name or cut tensors differently than the loaded model cannot be trained by neuron."
        )


class Masters:
    """The float32 values of a base folder with deltas over it, in order; folder and deltas may be URLs.

    Args:
        parameters: see `StoredModel`.

    Raises:
        UserError: a delta was made over another base or another architecture.
    """

    def __init__(
        self,
        base: str | Path,
        deltas: Sequence[str | Path | Delta] = (),
        parameters: Parameters | None = None,
    ) -> None:
        self.stored = StoredModel(base, parameters)
        self.deltas = opened(deltas)
        for delta in self.deltas:
            if delta.shapes == self.stored.shapes:
                continue
            for name in sorted(delta.shapes.keys() | self.stored.shapes.keys()):
                held, had = (shapes.get(name, "missing") for shapes in (delta.shapes, self.stored.shapes))
                if held != had:
                    raise UserError(
                        f"{delta.origin}: made for another model than {base}: {name} is {held} there and {had} "
                        "here. Apply it to the model it was trained from."
                    )

    @property
    def names(self) -> list[str]:
        return self.stored.names

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.stored.shapes

    def touches(self, name: str) -> bool:
        """Whether any delta holds values of this tensor."""
        return any(delta.count_of(name) for delta in self.deltas)

    def read(self, name: str) -> Tensor:
        """float32, in the tensor's shape, in storage of its own."""
        first = max((at for at, delta in enumerate(self.deltas) if delta.dense), default=None)
        if first is None:
            master = self.stored.read(name).to(torch.float32, copy=True).contiguous()
            first = -1
        else:
            master = self.deltas[first].values(name).clone().view(self.shapes[name])
        for delta in self.deltas[first + 1 :]:
            delta.put(name, master)
        return master

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, self.read(name)) for name in self.names)


def diff(before: Masters, after: Masters, base: str = "") -> Delta:
    """The delta from one model to another of the same architecture: the neurons whose float32 values differ.

    Args:
        before, after: the two models; the values kept are those of `after`.
        base: fingerprint of the base folder of `before`.

    Raises:
        UserError: they are not of one architecture.
    """
    if before.shapes != after.shapes:
        raise UserError(
            f"{before.stored.folder} and {after.stored.folder} are of different architectures, and cannot be compared."
        )

    def entries(name: str) -> tuple[Tensor, Tensor]:
        old, new = before.read(name).view(-1), after.read(name).view(-1)
        indices = (old.view(torch.int32) != new.view(torch.int32)).nonzero().view(-1)
        return indices.to(index_dtype(len(new))), new[indices]

    counts = {name: changed for name in before.names if (changed := len(entries(name)[1]))}
    return Delta(before.names, before.shapes, base, False, counts, entries, "the difference")


def iter_masters(base: str | Path, deltas: Sequence[str | Path | Delta] = ()) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 tensor) of a base folder with deltas over it, in the model's order, one tensor at a time."""
    return iter(Masters(base, deltas))


def invert(delta: Delta, base: str | Path, under: Sequence[str | Path | Delta] = ()) -> Delta:
    """The delta that undoes `delta`: the same neurons, with the values that they had before.

    Args:
        base: the base folder.
        under: the deltas that `delta` came on top of.
    """
    masters = Masters(base, under)

    def entries(name: str) -> tuple[Tensor | None, Tensor]:
        indices = delta.indices(name)
        flat = masters.read(name).view(-1)
        return indices, flat if indices is None else flat.index_select(0, indices)

    return Delta(
        delta.names, delta.shapes, delta.base, delta.dense, delta.counts, entries, f"undo of {delta.origin}"
    )
