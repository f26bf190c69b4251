"""Results of Ray tasks in the order of what they are about."""

from __future__ import annotations

import time

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from allo_ray.data.ordered_tasks import in_order
from allo_ray.errors import UserError


def _slow_first(number: int) -> int:
    time.sleep(0.5 if number == 0 else 0)
    if number < 0:
        raise UserError("below zero")
    return number * number


@pytest.mark.usefixtures("ray_cluster")
def test_order_and_errors() -> None:
    """The first of twenty ends last; more are asked for than may be under way (12 on 6 CPUs)."""
    assert list(in_order(_slow_first, range(20))) == [number * number for number in range(20)]
    with pytest.raises(UserError, match=r"^below zero$"):
        list(in_order(_slow_first, [1, -1]))


@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_that_holds_no_cpu_starts_tasks() -> None:
    """Tune puts a trial into a placement group of memory alone, and tasks would be looked for a CPU in there."""
    group = placement_group([{"memory": 1 << 20}])
    strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)

    @ray.remote(num_cpus=0, memory=1 << 20, scheduling_strategy=strategy)
    def trial() -> list[int]:
        return list(in_order(_slow_first, range(1, 4)))

    try:
        assert ray.get(trial.remote(), timeout=60) == [1, 4, 9]
    finally:
        remove_placement_group(group)
