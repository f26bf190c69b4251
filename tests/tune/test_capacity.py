"""How many stages and trials fit a cluster, node by node."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from allo_ray.capacity import needs, room
from allo_ray.config.load import load
from allo_ray.config.run import RunConfig
from allo_ray.errors import UserError
from allo_ray.tune.concurrency import TRIAL, concurrency

GIB = float(1 << 30)


def config(**changes: Any) -> RunConfig:
    cpu_only = [
        "trainer.num_gpus=0",
        "engine.pool.num_gpus=0",
        "engine.pool.actors=1",
        "model.path=tiny:llama",
    ]
    plain = {"trainer.workers": 1, "trainer.num_cpus": 1, "engine.pool.num_cpus": 1}
    told = plain | {name.replace("__", "."): value for name, value in changes.items()}
    return load("qa", [*cpu_only, *(f"{name}={value}" for name, value in told.items())])


def node(cpus: float, gpus: float = 0, memory: float = 64 * GIB) -> dict[str, float]:
    return {"CPU": cpus, "GPU": gpus, "memory": memory}


@pytest.mark.parametrize(
    ("run", "nodes", "fit"),
    [
        (config(), [node(6)], 3),
        (config(), [node(7)], 3),
        (config(trainer__workers=2), [node(6)], 3),
        (config(engine__pool__actors=3), [node(8)], 2),
        (config(trainer__workers="[1, 8]"), [node(6)], 3),
        (config(trainer__num_cpus=4), [node(3), node(3), node(5)], 1),
        (config(trainer__num_gpus=1), [node(64, 8)], 8),
        (config(trainer__num_gpus=1, trainer__workers=8), [node(64, 8)] * 4, 4),
        (config(trainer__num_gpus=4, trainer__workers=2), [node(64, 7)] * 2, 1),
        (config(trainer__num_gpus=0.5), [node(64, 2)], 4),
        (config(), [node(0), node(4), node(4)], 4),
        (config(), [node(64, memory=3 * GIB)], 3),
        (config(trainer__resources="{trainer: 1}"), [node(64) | {"trainer": 2}, node(64)], 2),
        (config(engine__pool__resources="{sampler: 0.5}"), [node(64) | {"sampler": 2}], 4),
    ],
)
def test_room_is_what_the_larger_kind_of_stage_leaves(run: RunConfig, nodes: list, fit: int) -> None:
    """Workers, or engines and a CPU that prepares their rows; nothing straddles two nodes."""
    assert room(needs(run, TRIAL), nodes) == fit


@pytest.mark.parametrize(
    ("run", "nodes", "said"),
    [
        (
            config(trainer__workers=8),
            [node(6)],
            r"needs 8 CPUs .*trainer.workers 8\); .* has 6 CPUs .* on 1 node",
        ),
        (
            config(engine__pool__num_gpus=1),
            [node(64)],
            r"needs 2 CPUs and 1 GPUs and 1 GiB of memory \(engine.pool.actors 1, and a CPU that prepares rows.*"
            r": too little GPU\. Lower engine",
        ),
        (
            config(trainer__num_cpus=8),
            [node(6), node(6)],
            "has 12 CPUs .* on 2 node.s., the largest with 6 CPUs",
        ),
        (config(), [], "on 0 node"),
        (
            config(),
            [node(64, memory=GIB / 2)] * 4,
            r"has 256 CPUs and 0 GPUs and 2 GiB of memory on 4 node.s., the largest with 64 CPUs and 0 GPUs and "
            r"0.5 GiB of memory: too little memory\. Start nodes with more memory",
        ),
        (
            config(trainer__resources="{trainer: 2}"),
            [node(64) | {"trainer": 1}],
            r"needs 1 CPUs and 0 GPUs and 2 trainer and 1 GiB .*: too little trainer\. .*lower trainer\.resources",
        ),
        (
            config(trainer__num_cpus=3, trainer__workers=2),
            [node(5), node(2)],
            r"needs 6 CPUs .* has 7 CPUs .*: too little on any one node\. Lower trainer\.workers",
        ),
    ],
)
def test_a_cluster_too_small_for_one_trial_is_told_with_both_numbers(
    run: RunConfig, nodes: list, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        room(needs(run, TRIAL), nodes)


def test_concurrency_follows_the_cluster_and_the_users_bound() -> None:
    assert concurrency(config(), None, [node(20)], local=False) == 10
    assert concurrency(config(), 4, [node(20)], local=False) == 4
    assert concurrency(config(), 40, [node(20)], local=False) == 10
    assert concurrency(config(), 3, [node(20)], local=True) == 3


@pytest.mark.parametrize(
    ("real_cpus", "free", "fit"), [(8, 64 * GIB, 8), (3, 64 * GIB, 3), (8, 7 * GIB, 2), (1, GIB, 1)]
)
def test_on_a_machine_of_the_users_own_real_cpus_and_memory_bound_it_too(
    monkeypatch: pytest.MonkeyPatch, real_cpus: int, free: float, fit: int
) -> None:
    """Twenty logical CPUs have room for ten trials; a trial takes 3.25 GiB, of which 2.25 are its engine's."""
    monkeypatch.setattr(os, "cpu_count", lambda: real_cpus)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert concurrency(config(), None, [node(20)], local=True) == fit
