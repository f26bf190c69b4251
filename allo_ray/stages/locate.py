"""Finds the neurons that moved most in the warm-up (Eq. 4): the exact global top k of |θ' - θ0|."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

from torch import Tensor

from allo_ray.models import fingerprint
from allo_ray.neurons.masters import iter_masters
from allo_ray.neurons.select import select
from allo_ray.stages.base import Context, Stage


def run(ctx: Context) -> None:
    """Writes selection.safetensors. Facts: neurons selected and in all, and both by tensor."""
    start, tuned = ctx.model("start").here, ctx.model("tuned").here
    options = ctx.settings["locate"]

    def tensors() -> Iterator[tuple[str, Tensor, Tensor]]:  # both models, tensor by tensor, in the same order
        pairs = zip(
            iter_masters(start.base, start.layers), iter_masters(tuned.base, tuned.layers), strict=True
        )
        for (name, before), (other, after) in pairs:
            assert name == other, f"tensor order differs: {name}, {other}"
            yield name, before, after

    order = ("band", *options["band"]) if options["order"] == "band" else options["order"]
    [selection] = select(
        tensors,
        [ctx.settings["k"]],
        order=order,
        include=options["include"],
        seed=ctx.settings["seed"],
        base=fingerprint(Path(start.base)),
    )
    selection.save(ctx.out / "selection.safetensors")
    ctx.facts.update(
        selected=selection.count,
        neurons=selection.total,
        tensors={name: [selection.count_of(name), selection.size_of(name)] for name in selection.names},
    )


def located(k: float) -> str:
    """What a run calls the node that locates the share k of the neurons: by per cent, no two k alike."""
    return f"locate {(100 * Decimal(repr(float(k)))).normalize():f} %"


LOCATE = Stage("locate", 1, run)
