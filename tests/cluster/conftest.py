"""One local multi-node cluster for the tests that need real nodes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ROOT / "cluster" / "local.sh"


@dataclass(frozen=True)
class Driver:
    """A process that joined the cluster, and the file that takes what it prints."""

    process: subprocess.Popen[bytes]
    out: Path

    def wait_for(self, there: Callable[[], bool], seconds: float = 300) -> None:
        """Returns once `there` is true; fails the test where the driver ends before, or takes too long."""
        patience = time.monotonic() + seconds
        while not there():
            assert self.process.poll() is None, self.out.read_text()[-4000:]
            assert time.monotonic() < patience, self.out.read_text()[-4000:]
            time.sleep(0.1)

    def finish(self) -> None:
        """Waits for its end, which has to be a good one."""
        assert self.process.wait(600) == 0, self.out.read_text()[-4000:]


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

    @contextmanager
    def driver(self, job: Callable[..., None], out: Path, *arguments: object) -> Iterator[Driver]:
        """Calls `job`, a function of a test module, with `arguments` as words in a process of its own on the head."""
        code = f"import sys; from {job.__module__} import {job.__name__} as job; job(*sys.argv[1:])"
        with out.open("wb") as printed:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
                cwd=ROOT,
                env={**self.environment, "PYTHONPATH": str(ROOT)},
                stdout=printed,
                stderr=subprocess.STDOUT,
            )
        try:
            yield Driver(process, out)
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def local_cluster() -> Iterator[LocalCluster]:
    """A head without CPUs, as in cluster/kuberay, and node1 with two CPUs for work and one for tasks that read rows."""
    # Not pytest's own folder: the paths of Ray's sockets have at most 107 characters.
    folder = tempfile.mkdtemp(prefix="allo-", dir="/tmp")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "ALLO_CLUSTER_DIR": folder,
        "ALLO_HEAD_CPUS": "0",
        "ALLO_NODE_CPUS": "3",
        "OMP_NUM_THREADS": "1",
        "RAY_metrics_report_interval_ms": "1000",
    }
    environment["PATH"] = f"{os.path.dirname(sys.executable)}:{environment['PATH']}"
    environment["ALLO_BIN"] = os.path.dirname(sys.executable)
    starter = LocalCluster("", environment)
    try:
        starter.run("start", "1")
        exports = dict(word.split("=", 1) for word in starter.run("env").split()[1:])
        yield LocalCluster(exports["RAY_API_SERVER_ADDRESS"], {**environment, **exports})
    finally:
        starter.run("stop")
        shutil.rmtree(folder, ignore_errors=True)
