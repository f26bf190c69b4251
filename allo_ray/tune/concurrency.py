"""How many trials run at a time: as many as the cluster, or this machine, has room for."""

from __future__ import annotations

import os
from collections.abc import Sequence

import psutil

from allo_ray import estimate
from allo_ray.capacity import READER, needs, room
from allo_ray.config.run import RunConfig
from allo_ray.models import neurons_of
from allo_ray.nodes import Bundle

#: Set aside for the process of a trial itself: interpreter, torch, Ray. A generous guess.
TRIAL: Bundle = {"memory": float(1 << 30)}


def concurrency(config: RunConfig, asked: int | None, nodes: Sequence[Bundle], local: bool) -> int:
    """Trials at a time: as many as there is room for, and at most `asked`.

    On one machine of the user's own, where logical CPUs are more than real ones, the default is one trial for each
    real CPU that a stage takes, and as many as fit the memory.

    Raises:
        UserError: the cluster is too small for one.
    """
    needed = needs(config, TRIAL)
    most = room(needed, nodes, "one trial")
    if asked is not None:
        return min(asked, most)
    if local:
        busy = max(
            sum(bundle.get("CPU", 0) for bundle in need.bundles if bundle is not READER) for need in needed
        )
        most = min(most, int((os.cpu_count() or 1) / busy))
        told = estimate.estimate(config, neurons_of(config.model))
        largest = max(*told.training.values(), told.engine) + int(TRIAL["memory"])
        most = min(most, psutil.virtual_memory().available // largest)
    return max(1, most)
