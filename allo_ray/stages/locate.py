"""Selects the neurons that moved most in the warm-up (Eq. 4): the exact global top k of |θ' - θ0|."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from decimal import Decimal
from functools import partial
from typing import TypeVar

from allo_ray.data.ordered_tasks import in_order
from allo_ray.neurons.importance import Ranked
from allo_ray.neurons.ranked_files import RankedFiles, map_shard
from allo_ray.neurons.select import select
from allo_ray.stages.base import Context, Stage
from allo_ray.stages.importance import HERE

Result = TypeVar("Result")


def run(ctx: Context) -> None:
    """Writes selection.safetensors. Facts: neurons selected and in all, and both by tensor."""
    folder, options = ctx.inputs["importance"].path, ctx.settings["locate"]
    files = RankedFiles.load(folder)
    order = ("band", *options["band"]) if options["order"] == "band" else options["order"]
    [selection] = select(
        files.counted,
        partial(mapped, folder, files),
        [ctx.settings["k"]],
        order=order,
        include=options["include"],
        seed=ctx.settings["seed"],
        base=files.base,
    )
    selection.save(ctx.out / "selection.safetensors")
    ctx.facts.update(
        selected=selection.count,
        neurons=selection.total,
        tensors={name: [selection.count_of(name), selection.size_of(name)] for name in selection.names},
    )


def mapped(
    folder: str, files: RankedFiles, function: Callable[[Ranked], Result], names: Collection[str]
) -> Iterator[Result]:
    """A function of each of these tensors, in order: a task for each shard, or in this process for a small model."""
    shards: dict[str, list[str]] = {}
    for name in names:
        shards.setdefault(f"{folder}/{files.shards[name]}", []).append(name)
    few = sum(one.size for one in files.counted) <= HERE
    for found in in_order(partial(_shard, function), shards.items(), here=few):
        yield from found


def _shard(function: Callable[[Ranked], Result], shard: tuple[str, list[str]]) -> list[Result]:
    path, names = shard
    return map_shard(function, path, names)


def located(k: float) -> str:
    """What a run calls the node that locates the share k of the neurons: by per cent, no two k alike."""
    return f"locate {(100 * Decimal(repr(float(k)))).normalize():f} %"


LOCATE = Stage("locate", 2, run)
