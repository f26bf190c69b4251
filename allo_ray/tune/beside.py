"""Actors that serve all trials of a campaign, on the driver's node."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def beside_driver(kind: type, *arguments: Any, **options: Any) -> Any:
    """Starts an actor of this class here; it reserves nothing. `options`: as Ray takes them."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options |= {"num_cpus": 0, "scheduling_strategy": here}
    return ray.remote(**options)(kind).remote(*arguments)
