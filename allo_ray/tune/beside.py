"""Actors that serve all trials of a campaign, on the driver's node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def beside_driver(kind: type, *arguments: Any, **options: Any) -> Any:
    """Starts an actor of this class here; it reserves nothing. `options`: as Ray takes them."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options |= {"num_cpus": 0, "scheduling_strategy": here}
    return ray.remote(**options)(kind).remote(*arguments)


@contextmanager
def ended(*actors: Any) -> Iterator[None]:
    """Ends them when the block ends: trials' arguments, which stay in the object store, refer to them."""
    try:
        yield
    finally:
        for actor in actors:
            ray.kill(actor)
