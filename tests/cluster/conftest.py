"""One local multi-node cluster for the tests that need real nodes."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

LOCAL = Path(__file__).resolve().parents[2] / "cluster" / "local.sh"


@dataclass(frozen=True)
class LocalCluster:
    """A cluster of cluster/local.sh: what a client needs, and its commands."""

    dashboard: str
    environment: dict[str, str]

    def run(self, *arguments: str) -> str:
        """Output of `cluster/local.sh ARGUMENTS`; fails the test on an error."""
        done = subprocess.run(
            [str(LOCAL), *arguments], capture_output=True, text=True, timeout=240, env=self.environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def local_cluster() -> Iterator[LocalCluster]:
    """A head and one more node; the head without CPUs of its own, as in cluster/kuberay."""
    # Not pytest's own folder: the paths of Ray's sockets have at most 107 characters.
    folder = tempfile.mkdtemp(prefix="allo-", dir="/tmp")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "ALLO_CLUSTER_DIR": folder,
        "ALLO_HEAD_CPUS": "0",
        "OMP_NUM_THREADS": "1",
        "RAY_metrics_report_interval_ms": "1000",
    }
    environment["PATH"] = f"{os.path.dirname(os.sys.executable)}:{environment['PATH']}"
    environment["ALLO_BIN"] = os.path.dirname(os.sys.executable)
    starter = LocalCluster("", environment)
    try:
        starter.run("start", "1")
        exports = dict(word.split("=", 1) for word in starter.run("env").split()[1:])
        yield LocalCluster(exports["RAY_API_SERVER_ADDRESS"], {**environment, **exports})
    finally:
        starter.run("stop")
        shutil.rmtree(folder, ignore_errors=True)
