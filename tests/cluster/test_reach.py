"""A store that one node does not share, on real nodes: named before any stage starts."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster.conftest import LocalCluster

ROOT = Path(__file__).resolve().parents[2]
CHECK = """
import json, sys, ray
from allo_ray.errors import UserError
from allo_ray.reach import check_folder, check_store
from allo_ray.store import Store
ray.init(log_to_driver=False)
told = {}
for name, check in {
    "store": lambda: check_store(Store(sys.argv[1])),
    "mine": lambda: check_folder(sys.argv[2], "Give another folder."),
    "memory": lambda: check_store(Store("memory://store")),
}.items():
    try:
        told[name] = check() or ""
    except UserError as error:
        told[name] = str(error)
told["nodes"] = {node["NodeID"][:8]: node["Resources"].get("blind", 0) for node in ray.nodes() if node["Alive"]}
print(json.dumps(told))
"""


@pytest.fixture
def blind_node(local_cluster: LocalCluster, tmp_path: Path) -> Iterator[Path]:
    """A folder that one node has another disk at: its processes live in a mount namespace of their own."""
    hidden = tmp_path / "shared"
    hidden.mkdir()
    hide = f"mount -t tmpfs none {hidden}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "sh", "-c", hide]).returncode:
        pytest.skip("hiding a folder from a node needs the right to mount")
    bin = tmp_path / "bin"
    bin.mkdir()
    python, ray = (Path(sys.executable).parent / name for name in ("python", "ray"))
    (bin / "python").write_text(f'#!/bin/sh\nexec {python} "$@"\n')
    start = f'exec unshare -m sh -c \'{hide} && exec "$0" "$@"\' {ray}'
    (bin / "ray").write_text(f'#!/bin/sh\n[ "$1" = start ] || exec {ray} "$@"\n{start} "$@"\n')
    for script in bin.iterdir():
        script.chmod(0o755)
    elsewhere = replace(local_cluster, environment={**local_cluster.environment, "ALLO_BIN": str(bin)})
    elsewhere.run("add", "blind", "--num-cpus", "1", "--resources", '{"blind": 1}')
    yield hidden
    local_cluster.run("kill", "blind")


@pytest.mark.slow
def test_the_node_that_does_not_share_the_store_is_named(
    local_cluster: LocalCluster, blind_node: Path, tmp_path: Path
) -> None:
    (tmp_path / "seen-by-all").mkdir()
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            CHECK,
            str(blind_node / "store"),
            str(tmp_path / "seen-by-all"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**local_cluster.environment, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.strip().splitlines()[-1])
    [blind] = [name for name, mark in told["nodes"].items() if mark]
    assert len(told["nodes"]) == 3
    assert f"id {blind}) does not see what the driver wrote there" in told["store"]
    assert "Set `store` to a folder that all nodes mount" in told["store"]
    assert told["mine"] == "", "every node shares that one"
    assert "does not see what the driver wrote there" in told["memory"], (
        "the memory of one process is no shared store"
    )
    assert not list((tmp_path / "seen-by-all" / ".reach").iterdir())
