"""How many stages a cluster has room for side by side: those of a run, or the trials of a campaign.

A trial runs one stage at a time, so what its largest stage takes is enough. Nothing is reserved beforehand: each stage
asks Ray for its own trainers, engines and Data tasks, and gives them back. Bounding their number keeps that from coming
to a stop: were all resources held by engines that wait for rows, the Data tasks that prepare these could never run.
Rows of trainers are only read, by tasks that take no CPU (`train/stream.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from allo_ray.config.base import bounds
from allo_ray.config.engine import EngineConfig
from allo_ray.config.run import ClusterConfig, RunConfig
from allo_ray.errors import UserError
from allo_ray.nodes import Bundle, cluster_nodes

GIB = 1 << 30
#: The task that prepares rows for engines.
READER: Bundle = {"CPU": 1.0}


@dataclass(frozen=True)
class Need:
    """What one kind of stage takes at once, and the settings that say so."""

    settings: str
    bundles: tuple[Bundle, ...]

    @property
    def words(self) -> str:
        """Such as "3 CPUs and 2 GPUs and 1 GiB of memory"."""
        return _words(self.amounts, list(self.amounts))

    @property
    def amounts(self) -> dict[str, float]:
        """The sum of all bundles; CPUs and GPUs first, also where there are none."""
        names = dict.fromkeys(["CPU", "GPU", *(name for bundle in self.bundles for name in bundle)])
        return {name: sum(bundle.get(name, 0) for bundle in self.bundles) for name in names}


def needs(config: RunConfig, *own: Bundle) -> list[Need]:
    """What training takes, and what sampling and evaluation take; and what the process takes that runs the stage."""
    trainer = config.trainer
    workers = bounds(trainer.workers)[0]
    worker = {"CPU": float(trainer.num_cpus), "GPU": float(trainer.num_gpus)} | trainer.resources
    training = Need(f"trainer.workers {workers}", (*[worker] * workers, *own))
    return [training, engine_need(config.engine, *own)]


def engine_need(engine: EngineConfig, *own: Bundle) -> Need:
    """What sampling, scoring and evaluation take."""
    pool = engine.pool
    actors = bounds(pool.actors)[0]
    actor = {"CPU": float(pool.num_cpus), "GPU": float(pool.num_gpus)} | pool.resources
    return Need(f"engine.pool.actors {actors}", (*[actor] * actors, READER, *own))


def check_engines(engine: EngineConfig, cluster: ClusterConfig) -> None:
    """Raises UserError where the running cluster has no room for a batch job's engines, which would wait for ever."""
    room([engine_need(engine)], cluster_nodes(cluster), "the job")


def room(needed: Sequence[Need], nodes: Sequence[Bundle], what: str = "one stage") -> int:
    """How often `what` fits side by side on nodes with these resources, whichever of `needed` each of them takes.

    Raises:
        UserError: not even one does; says what it needs, what there is, and what is short.
    """
    counts = [_copies(need.bundles, nodes) for need in needed]
    for need, count in zip(needed, counts, strict=True):
        if count == 0:
            raise _too_small(need, nodes, what)
    return min(counts)


def _too_small(need: Need, nodes: Sequence[Bundle], what: str) -> UserError:
    names = list(need.amounts)
    there = {name: sum(node.get(name, 0) for node in nodes) for name in names}
    largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in names}
    short = [
        name
        for name in names
        if need.amounts[name] > there[name] or max(one.get(name, 0) for one in need.bundles) > largest[name]
    ]
    group = need.settings.partition(".workers")[0].partition(".actors")[0]
    if short == ["memory"]:
        remedy = "Start nodes with more memory (`ray start --memory`), or a larger cluster (cluster.address)."
    elif short and not {"CPU", "GPU"} & set(short):
        remedy = f"Start nodes that offer more of it (`ray start --resources`), or lower {group}.resources."
    else:
        remedy = (
            f"Lower {need.settings.split()[0]} and what each takes, or join a larger cluster (cluster.address, "
            "cluster.num_cpus)."
        )
    also = ", and a CPU that prepares rows" if READER in need.bundles else ""
    return UserError(
        f"{what} needs {need.words} ({need.settings}{also}); the cluster has "
        f"{_words(there, names)} on {len(nodes)} node(s), the largest with {_words(largest, names)}: too little "
        f"{' and '.join(short) or 'on any one node'}. {remedy} A cluster that grows by itself is listed in "
        "cluster.nodes."
    )


def _copies(bundles: Sequence[Bundle], nodes: Sequence[Bundle]) -> int:
    """How often all bundles fit, each on one node; the largest are placed first, on the fullest node that has room."""
    free = [dict(node) for node in nodes]
    order = sorted(bundles, key=lambda one: (-one.get("GPU", 0), -one.get("CPU", 0)))
    copies = 0
    while True:
        for bundle in order:
            wanted = {name: amount for name, amount in bundle.items() if amount > 0}
            fitting = [
                node for node in free if all(node.get(name, 0) >= amount for name, amount in wanted.items())
            ]
            if not fitting:
                return copies
            node = min(fitting, key=lambda one: (one.get("GPU", 0), one.get("CPU", 0)))
            for name, amount in wanted.items():
                node[name] -= amount
        copies += 1


def _words(amounts: Mapping[str, float], names: Sequence[str]) -> str:
    units = {"CPU": "CPUs", "GPU": "GPUs", "memory": "GiB of memory"}
    return " and ".join(
        f"{amounts[name] / (GIB if name == 'memory' else 1):.4g} {units.get(name, name)}"
        for name in names
        if amounts[name] < math.inf
    )
