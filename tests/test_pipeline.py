"""The graph runs what is missing, side by side where it can, and stops at the first failure."""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from allo_ray.config.load import load
from allo_ray.config.run import RunConfig
from allo_ray.pipeline import Node, plan, run
from allo_ray.report.terminal import Progress, StageLine
from allo_ray.stages.base import Context, Stage
from allo_ray.store import Store, local_path


class Lines(Progress):
    """Progress that keeps quiet and remembers."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.started: list[str] = []
        self.cached: list[str] = []

    def stage(self, name: str) -> StageLine:
        self.started.append(name)
        return super().stage(name)

    def say(self, text: str) -> None:
        if text.endswith("in the store"):
            self.cached.append(text.split(":")[0])


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load("qa")


def _add(ctx: Context) -> None:
    numbers = [int(ctx.file(role, "number").read_text()) for role in ctx.inputs]
    (ctx.out / "number").write_text(str(sum(numbers) + ctx.settings["plus"]))
    ctx.facts["seen"] = len(numbers)


ADD = Stage("add", 1, _add)


def _diamond(plus: int) -> list[Node]:
    return [
        Node("a", ADD, {"plus": 1}, {}),
        Node("b", ADD, {"plus": 10}, {"left": "a"}),
        Node("c", ADD, {"plus": plus}, {"left": "a"}),
        Node("d", ADD, {"plus": 0}, {"left": "b", "right": "c"}),
    ]


def test_results_flow_along_the_graph_and_only_what_changed_runs_again(
    config: RunConfig, tmp_path: Path
) -> None:
    """a = 1, b = 1 + 10, c = 1 + 100, d = b + c = 112; with c's setting 200: d = 11 + 201 = 212."""
    store, lines = Store(str(tmp_path)), Lines()
    done = run(config, _diamond(100), store, lines)
    assert local_path(done["d"].artifact.file("number")).read_text() == "112"
    assert sorted(lines.started) == ["a", "b", "c", "d"]
    again = Lines()
    done = run(config, _diamond(200), store, again)
    assert local_path(done["d"].artifact.file("number")).read_text() == "212"
    assert (sorted(again.started), sorted(again.cached)) == (["c", "d"], ["a", "b"])
    assert [item.artifact is not None for item in plan(_diamond(200), store)] == [True] * 4


def test_a_run_that_waits_for_another_one_says_so(config: RunConfig, tmp_path: Path) -> None:
    """Another run has the lease of c; this one is away until it is given back, and not for a, b and d."""
    store, told = Store(str(tmp_path)), []
    key = next(item.key for item in plan(_diamond(100), store) if item.node.name == "c")
    held = ExitStack()
    held.enter_context(store.lease("add", key))

    class Desk:
        @contextmanager
        def away(self) -> Iterator[None]:
            told.append("away")
            held.close()
            yield
            told.append("back")

    run(config, _diamond(100), store, Lines(), desk=Desk())  # type: ignore[arg-type]
    assert told == ["away", "back"]


def test_independent_stages_run_at_the_same_time(config: RunConfig, tmp_path: Path) -> None:
    """Each of two stages waits for the other: one after the other they would never get past the barrier."""
    barrier = threading.Barrier(2, timeout=20)

    def meet(ctx: Context) -> None:
        barrier.wait()

    stage = Stage("meet", 1, meet)
    nodes = [Node("one", stage, {"n": 1}, {}), Node("two", stage, {"n": 2}, {})]
    assert len(run(config, nodes, Store(str(tmp_path)), Lines(), parallel=2)) == 2


def test_a_failure_stops_the_run_but_not_what_runs_beside_it(config: RunConfig, tmp_path: Path) -> None:
    def fail(ctx: Context) -> None:
        raise ValueError("broken on purpose")

    def slow(ctx: Context) -> None:
        time.sleep(0.5)

    nodes = [
        Node("bad", Stage("bad", 1, fail), {}, {}),
        Node("slow", Stage("slow", 1, slow), {}, {}),
        Node("after", ADD, {"plus": 0}, {"left": "slow"}),
    ]
    store = Store(str(tmp_path))
    with pytest.raises(ValueError, match="broken on purpose"):
        run(config, nodes, store, Lines())
    found = {item.node.name: item.artifact is not None for item in plan(nodes, store)}
    assert found == {"bad": False, "slow": True, "after": False}


def test_ctrl_c_does_not_wait_for_a_running_stage(config: RunConfig, tmp_path: Path) -> None:
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # what a shell starts in the background ignores it
    begun, over = threading.Event(), threading.Event()

    def long(ctx: Context) -> None:
        begun.set()
        over.wait(60)

    def interrupt() -> None:
        begun.wait(20)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(config, [Node("long", Stage("long", 1, long), {}, {})], Store(str(tmp_path)), Lines())
    assert time.monotonic() - started < 30
    over.set()
