"""A function of many things by Ray tasks, its results in the order of the things."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

from allo_ray.data.task_errors import users_error

Thing = TypeVar("Thing")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Thing], Result], things: Iterable[Thing], here: bool = False
) -> Iterator[Result]:
    """Results in order, as they come; at most two tasks for each CPU of the cluster are under way.

    A task takes one CPU and waits for nothing but that, so it holds up no one for longer than it works, and the
    smallest cluster runs it.

    Args:
        function: travels to the tasks, and should be small.
        here: one after the other in this process, which is faster where there is little to do.

    Raises:
        UserError: as `function` raises it.
    """
    if here or not ray.is_initialized():
        yield from map(function, things)
        return
    # Not in the placement group of a trial, which holds no CPU; and all nodes read from the store.
    task = ray.remote(_call).options(num_cpus=1, scheduling_strategy="SPREAD")
    waiting: deque[Any] = deque()
    try:
        for thing in things:
            waiting.append(task.remote(function, thing))
            # Asked each time: the cluster may grow.
            if len(waiting) >= 2 * max(1, int(ray.cluster_resources().get("CPU", 1))):
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    finally:  # after an error nobody waits for the others, and what they write may be another one's by then
        for reference in waiting:
            ray.cancel(reference)


def _call(function: Callable[[Thing], Result], thing: Thing) -> Result:
    return function(thing)


def _result(task: Any) -> Any:
    with users_error():
        return ray.get(task)
