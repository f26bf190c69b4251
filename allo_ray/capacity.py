"""How many stages a cluster has room for side by side: those of a run, or the trials of a campaign.

A trial runs one stage at a time, so what its largest stage takes is enough. Nothing is reserved beforehand: each stage
asks Ray for its own trainers, engines and Data tasks, and gives them back. Bounding their number keeps that from coming
to a stop: were all resources held by trainers that wait for rows, the Data tasks that read these could never run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from allo_ray.config.base import bounds
from allo_ray.config.run import RunConfig
from allo_ray.errors import UserError

Bundle = Mapping[str, float]

#: The task that reads rows for a stage.
READER: Bundle = {"CPU": 1.0}


@dataclass(frozen=True)
class Need:
    """What one kind of stage takes at once, and the settings that say so."""

    settings: str
    bundles: tuple[Bundle, ...]

    @property
    def words(self) -> str:
        """Such as "3 CPUs and 2 GPUs"."""
        return _words({name: sum(one.get(name, 0) for one in self.bundles) for name in ("CPU", "GPU")})


def needs(config: RunConfig, *own: Bundle) -> list[Need]:
    """What training takes, and what sampling and evaluation take; and what the process takes that runs the stage."""
    trainer, pool = config.trainer, config.engine.pool
    workers, actors = (bounds(trainer.workers)[0], bounds(pool.actors)[0])
    worker = {"CPU": float(trainer.num_cpus), "GPU": float(trainer.num_gpus)}
    actor = {"CPU": float(pool.num_cpus), "GPU": float(pool.num_gpus)}
    return [
        Need(f"trainer.workers {workers}", (*[worker] * workers, READER, *own)),
        Need(f"engine.pool.actors {actors}", (*[actor] * actors, READER, *own)),
    ]


def room(needed: Sequence[Need], nodes: Sequence[Bundle], what: str = "one stage") -> int:
    """How often `what` fits side by side on nodes with these resources, whichever of `needed` each of them takes.

    Raises:
        UserError: not even one does; says what it needs and what there is.
    """
    counts = [_copies(need.bundles, nodes) for need in needed]
    for need, count in zip(needed, counts, strict=True):
        if count == 0:
            there = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
            largest = {name: max((node.get(name, 0) for node in nodes), default=0) for name in ("CPU", "GPU")}
            raise UserError(
                f"{what} needs {need.words} ({need.settings}, and a CPU that reads rows); the cluster has "
                f"{_words(there)} on {len(nodes)} node(s), the largest with {_words(largest)}. Lower "
                f"{need.settings.split()[0]} and what each takes, or join a larger cluster (cluster.address, "
                "cluster.num_cpus)."
            )
    return min(counts)


def cluster_nodes() -> list[Bundle]:
    """Resources of the nodes of the cluster; where it grows by itself, one that stands for all it may have."""
    import ray
    from ray._private.state import state

    most = state.get_max_resources_from_cluster_config()
    if most:
        return [{name: float(amount) for name, amount in most.items()}]
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


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


def _words(amounts: Mapping[str, float]) -> str:
    return " and ".join(f"{amounts.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
