"""The stages as a graph: keys first, then whatever the store does not hold yet, independent stages side by side."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from allo_ray.config.run import RunConfig
from allo_ray.report.terminal import Progress
from allo_ray.stages.base import Context, Desk, Stage
from allo_ray.store import Artifact, Store


@dataclass(frozen=True)
class Node:
    """One stage in a run's graph.

    settings: the part of the config that decides its result. inputs: role -> name of the node that makes it.
    """

    name: str
    stage: Stage
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]


@dataclass(frozen=True)
class Planned:
    """A node with its key, and its artifact where the store has it."""

    node: Node
    key: str
    artifact: Artifact | None


@dataclass(frozen=True)
class Done:
    """A node's artifact, and whether this run made it.

    at_work: if so, from when to when it worked, after its start-up; seconds of `time.perf_counter`.
    """

    artifact: Artifact
    cached: bool
    at_work: tuple[float, float] | None = None


class Record(Protocol):
    """Takes rows of METRICS of a stage; may be told the same row again."""

    def __call__(self, stage: str, rows: Iterable[Mapping[str, Any]], /) -> None: ...


def nothing(stage: str, rows: Iterable[Mapping[str, Any]], /) -> None:
    """Records nothing."""


def plan(nodes: list[Node], store: Store) -> list[Planned]:
    """Keys of all nodes, which need no stage to run: a key depends on settings and on the inputs' keys alone."""
    keys: dict[str, str] = {}
    planned = []
    for node in nodes:
        inputs = {role: keys[name] for role, name in node.inputs.items()}
        key = keys[node.name] = store.key(node.stage.name, node.stage.version, node.settings, inputs)
        planned.append(Planned(node, key, store.find(node.stage.name, key)))
    return planned


def run(
    config: RunConfig,
    nodes: list[Node],
    store: Store,
    lines: Progress,
    parallel: int = 2,
    record: Record = nothing,
    desk: Desk | None = None,
) -> dict[str, Done]:
    """Runs what is missing and returns every node's artifact by name.

    At most `parallel` stages run at once; one starts as soon as its inputs are there. The first failure is raised
    once the stages running beside it have ended, and no further one starts. `record` is told the steps of the stages
    that train here; `desk` has their small work done together with other runs'.
    """
    waiting = {item.node.name: item for item in plan(nodes, store)}
    done: dict[str, Done] = {}
    running: dict[Future[Done], str] = {}
    failure: BaseException | None = None
    pool = ThreadPoolExecutor(parallel, thread_name_prefix="stage")
    try:
        while waiting or running:
            for item in list(_ready(waiting, done)) if failure is None else []:
                if item.artifact is None and len(running) == parallel:
                    continue
                del waiting[item.node.name]
                if item.artifact is not None:
                    lines.say(f"{item.node.name}: in the store")
                    done[item.node.name] = Done(item.artifact, cached=True)
                else:
                    inputs = {role: done[name].artifact for role, name in item.node.inputs.items()}
                    running[pool.submit(_execute, config, item, inputs, store, lines, record, desk)] = (
                        item.node.name
                    )
            if not running:
                if failure is not None:
                    break
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                error = future.exception()
                if error is None:
                    done[name] = future.result()
                else:
                    failure = failure or error
    except KeyboardInterrupt:
        # Nobody waits minutes for a stage: it ends with the cluster, and goes on from its work folder next time.
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
    if failure is not None:
        raise failure
    return done


def _ready(waiting: Mapping[str, Planned], done: Mapping[str, Done]) -> Iterator[Planned]:
    """Nodes whose inputs are all there, in the graph's order."""
    return (item for item in waiting.values() if all(name in done for name in item.node.inputs.values()))


def _execute(
    config: RunConfig,
    item: Planned,
    inputs: Mapping[str, Artifact],
    store: Store,
    lines: Progress,
    record: Record,
    desk: Desk | None,
) -> Done:
    node, key = item.node, item.key
    with store.lease(node.stage.name, key, desk.away if desk else nullcontext):
        found = store.find(node.stage.name, key)  # another process may have made it while we waited
        if found is not None:
            return Done(found, cached=True)
        folder = store.work_folder(node.stage.name, key)
        start = time.perf_counter()
        with lines.stage(node.name) as progress:
            recorded = partial(record, node.name)
            context = Context(config, node.settings, inputs, folder, key, store, progress, recorded, desk)
            node.stage.run(context)
        end = time.perf_counter()
        artifact = store.publish(
            node.stage.name,
            key,
            {
                "stage": node.stage.name,
                "version": node.stage.version,
                "settings": dict(node.settings),
                "inputs": {role: f"{artifact.stage}/{artifact.key}" for role, artifact in inputs.items()},
                "facts": context.facts,
                "seconds": round(end - start - context.waited_seconds, 3),
                "startup_seconds": round(context.startup_seconds, 3),
                "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        )
    idle = context.startup_seconds + context.waited_seconds
    return Done(artifact, cached=False, at_work=(min(start + idle, end), end))
