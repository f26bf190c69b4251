"""`allo align` on a cluster that cannot hold one of its stages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import ray

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_too_small_for_a_stage_is_told_with_the_numbers(tmp_path: Path) -> None:
    """Ray itself would wait for the nine CPUs without end. The session's cluster has six."""
    told = {
        "store": tmp_path / "store",
        "runs": tmp_path / "runs",
        "trainer.num_cpus": 9,
        "cluster.address": ray.get_runtime_context().gcs_address,
    }
    settings = [f"--set={name}={value}" for name, value in told.items()]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "jobs.cli", "align", "--config", "smoke", *settings],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert "one stage needs 9 CPUs" in done.stderr
    assert "the cluster has 6 CPUs" in done.stderr
    assert "Lower trainer.workers" in done.stderr
