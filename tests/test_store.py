"""Artifacts are published whole or not at all, once, and by one process at a time."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from allo_ray import store as stores
from allo_ray.errors import UserError
from allo_ray.store import LEASE_SECONDS, Store, _Watch, local_path

TOLD = {"facts": {"rows": 3}, "seconds": 1.5, "startup_seconds": 0.5}


def test_a_key_depends_on_everything_that_decides_a_result(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    base = store.key("forget", 1, {"u": 0.95}, {"pairs": "aa"})
    assert base == store.key("forget", 1, {"u": 0.95}, {"pairs": "aa"})
    others = [
        store.key("learn", 1, {"u": 0.95}, {"pairs": "aa"}),
        store.key("forget", 2, {"u": 0.95}, {"pairs": "aa"}),
        store.key("forget", 1, {"u": 0.9}, {"pairs": "aa"}),
        store.key("forget", 1, {"u": 0.95}, {"pairs": "bb"}),
    ]
    assert len({base, *others}) == 5


@pytest.mark.parametrize("url", ["{tmp}", "memory://store-{name}"])
def test_published_artifacts_are_found(url: str, tmp_path: Path) -> None:
    store = Store(url.format(tmp=tmp_path, name=tmp_path.name))
    assert store.find("pairs", "k1") is None
    (store.work_folder("pairs", "k1") / "deep").mkdir()
    (store.work_folder("pairs", "k1") / "deep" / "pairs.txt").write_text("hello")
    made = store.publish("pairs", "k1", TOLD)
    found = store.find("pairs", "k1")
    assert found == made
    assert found is not None
    assert (found.facts, found.seconds, found.startup_seconds) == ({"rows": 3}, 1.5, 0.5)
    with store.files.open(found.file("deep/pairs.txt"), "rt") as file:
        assert file.read() == "hello"


def test_an_unfinished_stage_is_no_artifact_and_keeps_its_work(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (store.work_folder("sample", "k") / "shard-0").write_text("half")
    again = Store(str(tmp_path))
    assert again.find("sample", "k") is None
    assert (again.work_folder("sample", "k") / "shard-0").read_text() == "half"


def test_the_second_publication_leaves_the_first_in_place(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (store.work_folder("x", "k") / "who").write_text("first")
    store.publish("x", "k", TOLD)
    (store.work_folder("x", "k") / "who").write_text("second")
    artifact = store.publish("x", "k", TOLD)
    assert local_path(artifact.file("who")).read_text() == "first"


def _hold(root: str, log: str) -> None:
    store = Store(root)
    with store.lease("x", "k"):
        for word in ("in", "out"):
            with open(log, "a") as file:
                file.write(f"{word} {os.getpid()}\n")
            time.sleep(0.3)


def test_a_lease_is_held_by_one_process_at_a_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    spawn = multiprocessing.get_context("spawn")
    holders = [spawn.Process(target=_hold, args=(str(tmp_path / "store"), str(log))) for _ in range(3)]
    for holder in holders:
        holder.start()
    for holder in holders:
        holder.join(60)
    lines = [line.split() for line in log.read_text().splitlines()]
    assert len(lines) == 6
    for (entered, first), (left, second) in zip(lines[::2], lines[1::2], strict=True):
        assert (entered, left, first) == ("in", "out", second)


def test_who_waits_for_a_lease_may_say_so(tmp_path: Path) -> None:
    """The first one does not wait; the second one does until the first has ended."""
    told: list[str] = []

    @contextmanager
    def waiting() -> Iterator[None]:
        told.append("waits")
        first.close()
        yield
        told.append("goes on")

    first = ExitStack()
    store = Store(str(tmp_path))
    first.enter_context(store.lease("x", "k", waiting))
    assert told == []
    with store.lease("x", "k", waiting):
        assert told == ["waits", "goes on"]


def test_the_lease_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    dead = {"owner": "gone", "host": os.uname().nodename, "pid": 2**22 + 1, "time": time.time()}
    leases = tmp_path / ".leases"
    leases.mkdir()
    (leases / "x-k.json").write_text(json.dumps(dead))
    start = time.monotonic()
    with store.lease("x", "k"):
        assert time.monotonic() - start < 5


def test_the_lease_of_a_process_that_nobody_waited_for_is_taken_over(tmp_path: Path) -> None:
    """A zombie keeps its number, and works on nothing."""
    store = Store(str(tmp_path))
    zombie = subprocess.Popen(["true"])
    while psutil.Process(zombie.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    held = {"owner": "gone", "host": os.uname().nodename, "pid": zombie.pid, "time": time.time()}
    (tmp_path / ".leases").mkdir()
    (tmp_path / ".leases" / "x-k.json").write_text(json.dumps(held))
    start = time.monotonic()
    with store.lease("x", "k"):
        assert time.monotonic() - start < 5
    zombie.wait()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The clock of the process that waits; tests set its `now`."""
    told = SimpleNamespace(now=1000.0)
    fake = SimpleNamespace(monotonic=lambda: told.now, time=time.time, sleep=lambda seconds: None)
    monkeypatch.setattr(stores, "time", fake)
    return told


def test_a_lease_whose_holder_died_over_writing_it_is_taken_over(
    tmp_path: Path, clock: SimpleNamespace
) -> None:
    store, lease, watch = Store(str(tmp_path)), tmp_path / ".leases" / "x-k.json", _Watch()
    lease.parent.mkdir()
    lease.touch()
    assert not store._take(str(lease), "me", watch), "it may be written just now"
    clock.now += LEASE_SECONDS + 1
    assert store._take(str(lease), "me", watch)


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0])
def test_another_hosts_lease_lasts_as_long_as_it_beats_whatever_the_clock_there_says(
    tmp_path: Path, clock: SimpleNamespace, ahead: float
) -> None:
    """Beats 29 s apart by the waiter's clock keep it, by a clock an hour ahead or behind; 31 s without one lose it."""
    store, lease, watch = Store(str(tmp_path)), tmp_path / ".leases" / "x-k.json", _Watch()
    lease.parent.mkdir()
    for beat in range(4):
        told = {"owner": "other", "host": "elsewhere", "pid": 1, "time": time.time() + ahead + 29 * beat}
        lease.write_text(json.dumps(told))
        assert not store._take(str(lease), "me", watch)
        clock.now += LEASE_SECONDS - 1
    assert not store._take(str(lease), "me", watch)
    clock.now += 2
    assert store._take(str(lease), "me", watch)
    assert store._holder(str(lease)) == "me"


@pytest.mark.parametrize("url", ["{tmp}/store", "memory://leases-{name}"])
def test_of_all_who_see_that_a_lease_has_expired_one_gets_it(url: str, tmp_path: Path) -> None:
    """All read it at the same moment, before any of them writes."""
    store = Store(url.format(tmp=tmp_path, name=tmp_path.name))
    path = f"{store.root}/.leases/x-k.json"
    gone = {"owner": "gone", "host": "elsewhere", "pid": 1, "time": 0}
    store.files.makedirs(store._strip(f"{store.root}/.leases"), exist_ok=True)
    with store.files.open(path, "wt") as file:
        file.write(json.dumps(gone))
    together = threading.Barrier(8)

    def seen_by_all(told: Mapping[str, Any], watch: _Watch) -> bool:
        together.wait(20)
        return True

    store._expired = seen_by_all
    with ThreadPoolExecutor(8) as pool:
        took = list(pool.map(lambda number: store._take(path, f"owner-{number}", _Watch()), range(8)))
    assert took.count(True) == 1
    assert store._holder(path) == f"owner-{took.index(True)}"


def test_who_lost_its_lease_leaves_the_next_holder_alone(tmp_path: Path) -> None:
    store, lease = Store(str(tmp_path)), tmp_path / ".leases" / "x-k.json"
    other = json.dumps({"owner": "other", "host": "elsewhere", "pid": 1, "time": time.time()})
    with store.lease("x", "k"):
        lease.write_text(other)
    assert lease.read_text() == other


def test_a_store_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="written in format 99"):
        Store(str(tmp_path))


def test_a_store_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", "/proc/none"):
        with pytest.raises(UserError, match="Give a folder that you may write"):
            Store(str(path))
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(UserError, match=r"store\.json is broken"):
        Store(str(tmp_path))
