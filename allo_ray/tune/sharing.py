"""Which stages of a campaign are the same in every trial, and which part of a run comes before its last one.

A stage's key depends on its settings and inputs alone, so two runs share a stage where its keys are equal. A space
is told apart by its ends: a stage whose key is the same at all of them is the same in between.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from allo_ray.config.run import RunConfig
from allo_ray.config.space import Value
from allo_ray.config.tune import Campaign
from allo_ray.errors import UserError
from allo_ray.pipeline import Node, plan
from allo_ray.store import Store
from allo_ray.tune.measure import EVALUATE, FORGET, LEARN, restricted

Graph = Callable[[RunConfig], list[Node]]
#: Combinations of ends that are tried at most; beyond, each field is varied alone.
MOST_CORNERS = 64


def corners(campaign: Campaign) -> Iterator[dict[str, Value]]:
    """The ends of the space: each field alone first, the others at their first one, then all combinations."""
    ends = {name: told.ends for name, told in campaign.config.space.items()}
    first = {name: values[0] for name, values in ends.items()}
    seen = [first]
    yield first
    combinations = 1
    for name, values in ends.items():
        combinations *= len(values)
        for value in values[1:]:
            seen.append({**first, name: value})
            yield seen[-1]
    last = {name: values[-1] for name, values in ends.items()}
    rest = itertools.product(*ends.values()) if combinations <= MOST_CORNERS else [last.values()]
    for values in rest:
        corner = dict(zip(ends, values, strict=True))
        if corner not in seen:
            yield corner


def shared_keys(campaign: Campaign, graph: Graph, store: Store) -> set[str]:
    """Keys of the stages that every trial has. Checks the space on the way.

    Raises:
        UserError: the base config does not allow a corner of the space or what lies between, or a field of it changes
            no stage.
    """
    # The ends of a field for whole numbers may be right where what lies between them is not.
    campaign.run({name: told.inside for name, told in campaign.config.space.items()})
    first: dict[str, Value] = {}
    keys: set[str] | None = None
    moved: set[str] = set()
    for corner in corners(campaign):
        found = {item.key for item in plan(graph(campaign.run(corner)), store)}
        if keys is None:
            first, keys, begun = corner, found, found
            continue
        differing = [name for name in corner if corner[name] != first[name]]
        if len(differing) == 1 and found != begun:
            moved.add(differing[0])
        keys &= found
    still = [name for name in campaign.config.space if name not in moved]
    if still:
        raise UserError(
            f"campaign {campaign.config.name}, space: {', '.join(still)} changes no result of the base "
            f"{campaign.config.base}. Search other fields (resources such as trainer.workers change none)."
        )
    assert keys is not None, "a space has corners"
    return keys


def shared_part(nodes: Sequence[Node], store: Store, keys: set[str]) -> list[Node]:
    """The nodes that all trials have, and the evaluation of the models among them."""
    part = {item.node.name: item.node for item in plan(list(nodes), store) if item.key in keys}
    evaluate = next(node for node in nodes if node.name == EVALUATE)
    asked = None if EVALUATE in part else restricted(evaluate, part)
    return [*part.values(), *([asked] if asked else [])]


def early_part(nodes: Sequence[Node]) -> list[Node]:
    """What a run computes up to its forgotten model, and the evaluation of the models that it has by then.

    Raises:
        UserError: the run has no forgetting, or nothing after it.
    """
    named = {node.name: node for node in nodes}
    if FORGET not in named or LEARN not in named:
        raise UserError(
            "scheduler: asha stops trials between forgetting and learning, so the base needs both. "
            "Give the sections `forget` and `learn`, or set scheduler: none."
        )
    before = {name: node for name, node in named.items() if not _needs(named, name, LEARN)}
    asked = restricted(named[EVALUATE], before)
    assert asked is not None, "the forgotten model is evaluated"
    wanted: set[str] = set()
    for name in asked.inputs.values():
        wanted |= {name, *_inputs(named, name)}
    return [*(node for node in nodes if node.name in wanted), asked]


def _needs(named: Mapping[str, Node], name: str, other: str) -> bool:
    return name == other or other in _inputs(named, name)


def _inputs(named: Mapping[str, Node], name: str) -> set[str]:
    """All nodes that a node needs, directly or not."""
    direct = set(named[name].inputs.values())
    return direct.union(*(_inputs(named, one) for one in direct))
