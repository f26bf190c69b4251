"""cluster/local.sh: real nodes on one machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cluster.conftest import LOCAL, LocalCluster

# Tasks of one CPU each; prints on how many nodes they ran and what the cluster offers.
WHERE = """
import json, time, ray
ray.init(log_to_driver=False)
@ray.remote(num_cpus=1)
def node():
    time.sleep(0.5)
    return ray.get_runtime_context().get_node_id()
nodes = set(ray.get([node.remote() for _ in range(12)]))
print(json.dumps([len(nodes), ray.cluster_resources().get("trainer", 0)]))
"""


def where(cluster: LocalCluster) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WHERE],
        capture_output=True,
        text=True,
        timeout=240,
        env=cluster.environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_node_joins_with_its_own_resources_and_can_be_lost(local_cluster: LocalCluster) -> None:
    """The head has no CPUs: work runs on node1, then on node1 and the added one, then on node1 again."""
    local_cluster.run("add", "big", "--num-cpus", "4", "--resources", '{"trainer": 2}')
    assert where(local_cluster) == "[2, 2.0]"
    local_cluster.run("kill", "big")
    assert where(local_cluster) == "[1, 0]"


def test_without_a_command_it_explains_itself() -> None:
    done = subprocess.run([str(LOCAL)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "cluster/local.sh start" in done.stdout
