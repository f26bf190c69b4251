"""Whether every node of the running cluster reaches what stages exchange, found out before the first one starts.

The driver writes a file, a task on each node reads it and writes one of its own, and the driver reads those. A folder
of the same name on another machine's own disk passes neither. On nodes that come later their work looks (`expect`).
"""

from __future__ import annotations

import socket
import time
import uuid
from pathlib import Path

import fsspec
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from allo_ray.errors import UserError
from allo_ray.store import Store

#: Network file systems show a new file to other machines late.
LATE_SECONDS = 10.0
#: A node that has not answered by then does not answer.
ANSWER_SECONDS = 120.0


def check_store(store: Store) -> None:
    """Checks the store, and where it is behind a URL the folder in which its stages work.

    Raises:
        UserError: a node does not reach one of them; names the node.
    """
    shared = "Set `store` to a folder that all nodes mount at the same path"
    check_folder(store.root, f"{shared}, or to a URL that all of them can open.")
    if not store.local:
        remedy = f"Stages work there before they publish: {shared}, or ALLO_RAY_CACHE here to such a folder."
        check_folder(str(store.work_root), remedy)


def check_results(out: str, work: Path) -> None:
    """Checks the output of a batch job, and the folder `work` where it prepares its rows.

    Raises:
        UserError: a node does not reach one of them; names the node.
    """
    check_folder(out, "Set `out` to a folder that all nodes mount at the same path, or to a URL.")
    if "://" in out:
        remedy = "Rows are prepared there: set ALLO_RAY_CACHE here to a folder that all nodes mount at the same path."
        check_folder(str(work.absolute()), remedy)


def check_folder(folder: str, remedy: str) -> None:
    """Checks one folder or URL; does nothing on a cluster of a single node.

    Raises:
        UserError: a node does not reach it; names the node.
    """
    nodes = alive_nodes()
    if len(nodes) < 2:
        return
    folder = folder if "://" in folder else str(Path(folder).absolute())
    files, root = fsspec.core.url_to_fs(folder)
    place, token = f"{root.rstrip('/')}/.reach", uuid.uuid4().hex
    files.makedirs(place, exist_ok=True)
    try:
        _write(folder, token, token)
        asked = {
            _answer.options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            ).remote(folder, token, f"{token}-{node}"): node
            for node in nodes
        }
        ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
        for answer, node in asked.items():
            problem = _problem(answer, folder, f"{token}-{node}", token)
            if problem and node in alive_nodes():  # a node that has just left does not count
                raise UserError(f"{folder}: node {nodes[node]} {problem}. {remedy}")
    finally:
        for left in files.glob(f"{place}/{token}*"):
            files.rm_file(left)


def expect(path: str) -> None:
    """On a node that may have come after the check: whether it sees a file or folder that the driver has made.

    Raises:
        UserError: it does not; names the node.
    """
    patience = time.monotonic() + LATE_SECONDS
    while "://" not in path and not Path(path).exists():
        if time.monotonic() > patience:
            raise UserError(
                f"{path}: node {socket.gethostname()} does not see this, which the driver has made. All nodes, also "
                "those that join later, have to mount its folder at the same path."
            )
        time.sleep(0.5)


def alive_nodes() -> dict[str, str]:
    """Id of every living node -> what to call it."""
    return {
        node[
            "NodeID"
        ]: f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, id {node['NodeID'][:8]})"
        for node in ray.nodes()
        if node["Alive"]
    }


def _problem(answer: ray.ObjectRef, folder: str, name: str, token: str) -> str:
    try:
        told = ray.get(answer, timeout=0)
    except RayError as error:
        return f"does not answer ({str(error).strip().splitlines()[-1].strip()})"
    return told or _differs(folder, name, token, "its own file does not arrive here")


@ray.remote
def _answer(folder: str, token: str, mine: str) -> str:
    """What is wrong at this node, or nothing."""
    problem = _differs(folder, token, token, "does not see what the driver wrote there")
    if problem:
        return problem
    try:
        _write(folder, mine, token)
    except OSError as error:
        return f"cannot write there ({error.strerror or error})"
    return ""


def _differs(folder: str, name: str, text: str, missing: str) -> str:
    """Why the file does not hold `text`, or nothing; waits a little for a file that is not there."""
    patience = time.monotonic() + LATE_SECONDS
    while True:
        try:
            files, root = fsspec.core.url_to_fs(folder)
            files.invalidate_cache()
            found = files.cat_file(f"{root.rstrip('/')}/.reach/{name}").decode()
            return "" if found == text else missing
        except FileNotFoundError:
            if time.monotonic() > patience:
                return missing
        except Exception as error:  # a file system's client raises what it likes
            return f"cannot read there ({str(error).strip().splitlines()[0]})"
        time.sleep(0.5)


def _write(folder: str, name: str, text: str) -> None:
    files, root = fsspec.core.url_to_fs(folder)
    files.pipe_file(f"{root.rstrip('/')}/.reach/{name}", text.encode())
