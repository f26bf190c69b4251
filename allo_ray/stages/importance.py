"""Measures how far every neuron moved in the warm-up (Eq. 4), once for every k that is then cut from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from allo_ray.data.ordered_tasks import in_order
from allo_ray.models import ModelRef, fingerprint
from allo_ray.neurons.importance import Counted
from allo_ray.neurons.masters import Masters, Parameters
from allo_ray.neurons.ranked_files import RankedFiles, write_shard
from allo_ray.stages.base import Context, Stage

#: Neurons of one task; a larger tensor has a task, and a shard, of its own.
GROUP = 1 << 25
#: Models of so many neurons are measured in this process sooner than tasks have started.
HERE = 1 << 28


@dataclass(frozen=True)
class Pair:
    """θ0 and θ', as tasks open them."""

    start: ModelRef
    tuned: ModelRef
    parameters: Parameters

    def write(self, folder: Path, shard: tuple[str, list[str]]) -> list[Counted]:
        """One task: measures the tensors of a shard (file name, tensors)."""
        name, tensors = shard
        before, after = (
            Masters(model.base, model.layers, self.parameters) for model in (self.start, self.tuned)
        )
        return write_shard(folder / name, before, after, tensors)


def run(ctx: Context) -> None:
    """Writes shards of ranked importances and their index. Facts: neurons and shards."""
    start, tuned = ctx.model("start"), ctx.model("tuned")
    masters = Masters(tuned.base, tuned.layers)
    sizes = {name: torch.Size(shape).numel() for name, shape in masters.shapes.items()}
    shards = {f"importance-{number:05}.safetensors": names for number, names in enumerate(groups(sizes))}
    write = partial(Pair(start, tuned, masters.stored.parameters).write, ctx.out)
    counted: list[Counted] = []
    for found in in_order(write, shards.items(), here=sum(sizes.values()) <= HERE):
        counted += found
        ctx.progress.update(len(counted), len(sizes), "tensor")
    told = next((delta.base for delta in masters.deltas if delta.base), None)
    files = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    RankedFiles(counted, files, told or fingerprint(start.here.base)).save(ctx.out)
    ctx.facts.update(neurons=sum(sizes.values()), shards=len(shards))


def groups(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Tensors that lie beside each other, as many as have up to GROUP neurons."""
    names: list[str] = []
    for name in sizes:
        if names and sum(sizes[one] for one in names) + sizes[name] > GROUP:
            yield names
            names = []
        names.append(name)
    yield names


IMPORTANCE = Stage("importance", 1, run)
