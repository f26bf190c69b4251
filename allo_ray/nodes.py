"""The nodes of a Ray cluster: those that live, or where it grows by itself those that it may have.

An autoscaler starts nodes for what waits, but Ray does not tell what it could start: its own
`get_max_resources_from_cluster_config` has no reporter in the open-source program (2.60). So whoever describes the
cluster says it: `cluster.nodes` of a config, or the environment variable ALLO_RAY_NODES on the head, as YAML text of
the same list or as the path of a file of Ray's cluster launcher.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from pydantic import TypeAdapter, ValidationError

from allo_ray.config.run import ClusterConfig, NodeType
from allo_ray.errors import UserError

#: What one node offers, or one process takes: name -> amount.
Bundle = Mapping[str, float]

VARIABLE = "ALLO_RAY_NODES"
#: The resource by which Ray marks the head.
_HEAD = "node:__internal_head__"


def cluster_nodes(config: ClusterConfig) -> list[Bundle]:
    """What each node of the running cluster offers; where it grows by itself, the head and all that it may grow to.

    Raises:
        UserError: ALLO_RAY_NODES does not say what nodes there may be.
    """
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    may_come = growth(config.nodes, os.environ.get(VARIABLE))
    return [node for node in alive if _HEAD in node] + may_come if may_come else alive


def growth(types: Sequence[NodeType], told: str | None) -> list[Bundle]:
    """A bundle for each node that may come: of `types`, or where there are none of what ALLO_RAY_NODES says."""
    if types or not told:
        return [bundle for one in types for bundle in _copies(one)]
    if told.lstrip().startswith(("[", "-")):
        try:
            listed = TypeAdapter(tuple[NodeType, ...]).validate_python(yaml.safe_load(told))
        except ValidationError as error:
            first = error.errors()[0]
            raise _wrong(told, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        except yaml.YAMLError as error:
            raise _wrong(told, error) from None
        return growth(listed, None)
    try:
        return _of_launcher(yaml.safe_load(Path(told).expanduser().read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise _wrong(told, error) from None


def _copies(one: NodeType) -> list[Bundle]:
    memory = math.inf if one.memory is None else one.memory
    offered = {"CPU": one.num_cpus, "GPU": one.num_gpus, "memory": memory} | one.resources
    return [offered] * one.count


def _of_launcher(config: Mapping) -> list[Bundle]:
    """Of a file of `ray up` as it lies on the head, with what each machine offers filled in.

    Where all kinds together may not come in full (`max_workers` of the whole file) they are counted in turn; a run that
    needs more of one kind says so in `cluster.nodes`.
    """
    kinds = [
        kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]
    ]
    turns = range(max((kind["max_workers"] for kind in kinds), default=0))
    coming = [kind for turn in turns for kind in kinds if turn < kind["max_workers"]]
    return [
        {"memory": math.inf} | {name: float(amount) for name, amount in kind["resources"].items()}
        for kind in coming[: config["max_workers"]]
    ]


def _wrong(told: str, problem: Exception | str) -> UserError:
    return UserError(
        f"{VARIABLE}={told}: {str(problem).splitlines()[0]}. It holds a list such as [{{count: 8, num_cpus: 12, "
        "num_gpus: 1}], or names a file of Ray's cluster launcher; or set cluster.nodes in the config."
    )
