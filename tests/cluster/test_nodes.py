"""What a cluster that grows by itself may have, as the files in cluster/ say it, counts as room."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import ray
import yaml

from allo_ray.capacity import Need, needs, room
from allo_ray.config.load import load
from allo_ray.config.run import ClusterConfig, NodeType
from allo_ray.errors import UserError
from allo_ray.nodes import cluster_nodes, growth
from tests.cluster.test_kuberay import rendered

ROOT = Path(__file__).resolve().parents[2]
GIB = 1 << 30
TRAINER = {"CPU": 12, "GPU": 1, "memory": 96 * GIB, "trainer": 1}
SAMPLER = {"CPU": 8, "GPU": 1, "memory": 64 * GIB, "sampler": 1}

TOLD_TRAINER = {"CPU": 12, "GPU": 1, "memory": math.inf, "trainer": 1}
TOLD_SAMPLER = {"CPU": 8, "GPU": 1, "memory": math.inf, "sampler": 1}


def alive(*resources: Mapping[str, float]) -> list[dict]:
    return [{"Alive": True, "Resources": one} for one in resources] + [
        {"Alive": False, "Resources": {"CPU": 99}}
    ]


def test_kuberay_says_what_its_groups_may_grow_to() -> None:
    """values.env: 8 trainers of 12 CPUs, a GPU and 96 GiB; 16 samplers of 8 CPUs, a GPU and 64 GiB."""
    (cluster,) = rendered("raycluster.yaml")
    [container] = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    told = {one["name"]: one["value"] for one in container["env"]}["ALLO_RAY_NODES"]
    assert growth((), told) == [TRAINER] * 8 + [SAMPLER] * 16


def test_the_launchers_file_says_it_too(tmp_path: Path) -> None:
    """gcp.yaml: 8 trainers and 16 samplers, whose memory it does not tell; the head is no worker. With room for 3
    in all the kinds are counted in turn."""
    config = yaml.safe_load((ROOT / "cluster" / "gcp.yaml").read_text())
    assert growth((), str(ROOT / "cluster" / "gcp.yaml")) == (
        [TOLD_TRAINER, TOLD_SAMPLER] * 8 + [TOLD_SAMPLER] * 8
    )
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(config | {"max_workers": 3}, sort_keys=False))
    assert growth((), str(file)) == [TOLD_TRAINER, TOLD_SAMPLER, TOLD_TRAINER]


def test_the_paper_preset_fits_a_cluster_that_starts_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """qa: 8 trainers of 4 CPUs and a GPU each. 24 GPUs may come: three runs; of the living nodes none has a CPU."""
    head = {"CPU": 0.0, "memory": 11.0 * GIB, "node:__internal_head__": 1.0}
    monkeypatch.setattr(ray, "nodes", lambda: alive(head, TRAINER))
    (cluster,) = rendered("raycluster.yaml")
    environment = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    monkeypatch.setenv(
        "ALLO_RAY_NODES", {one["name"]: one.get("value") for one in environment}["ALLO_RAY_NODES"]
    )
    nodes = cluster_nodes(ClusterConfig())
    assert nodes == [head] + [TRAINER] * 8 + [SAMPLER] * 16, "the trainer that lives is one of the eight"
    assert room(needs(load("qa")), nodes) == 3
    with pytest.raises(UserError, match=r"has 0 CPUs and 0 GPUs.*cluster\.nodes"):
        room(needs(load("qa")), [head])


def test_a_config_overrules_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLO_RAY_NODES", "[{count: 9, num_cpus: 9}]")
    config = ClusterConfig(nodes=(NodeType(count=2, num_cpus=4, memory="1.5Gi"),))  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(ray, "nodes", lambda: alive({"CPU": 1.0}))
    assert cluster_nodes(config) == [{"CPU": 4, "GPU": 0, "memory": 1.5 * GIB}] * 2


def test_amounts_as_kubernetes_writes_them() -> None:
    """As YAML in lines, too; G is a power of 1000, and a group without a GPU offers no sampler."""
    told = "- count: 1\n  num_cpus: 2\n  memory: 96G\n  resources: {sampler: 0}\n"
    assert growth((), told) == [{"CPU": 2, "GPU": 0, "memory": 96e9, "sampler": 0}]


def test_memory_that_is_not_told_is_enough() -> None:
    nodes = growth((NodeType(count=2, num_cpus=4),), None)
    assert room([Need("trainer.workers 1", ({"CPU": 1, "memory": 8.0 * GIB},))], nodes) == 8
    with pytest.raises(UserError, match=r"has 8 CPUs and 0 GPUs on 2 node"):
        room([Need("trainer.workers 1", ({"CPU": 9, "memory": 8.0 * GIB},))], nodes)


def test_a_cluster_that_does_not_grow_is_what_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALLO_RAY_NODES", raising=False)
    monkeypatch.setattr(ray, "nodes", lambda: alive({"CPU": 2.0}, {"CPU": 4.0}))
    assert cluster_nodes(ClusterConfig()) == [{"CPU": 2.0}, {"CPU": 4.0}]


@pytest.mark.parametrize(
    "told", ["[{count: 2}]", "[{count: 1, num_cpus: 2, cpus: 3}]", "/no/such.yaml", "[{"]
)
def test_a_wrong_variable_is_named(told: str) -> None:
    with pytest.raises(UserError, match="ALLO_RAY_NODES="):
        growth((), told)
