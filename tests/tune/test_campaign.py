"""Campaigns on a real cluster with Ray Tune: what is shared, how many run at once, what resumes, what is reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from allo_ray import pipeline
from allo_ray.config.load import load
from allo_ray.config.tune import load_campaign
from allo_ray.errors import UserError
from allo_ray.store import Store
from allo_ray.tune.records import Records, folder_of
from tests.tune.stages import forgettings, graph, journal, run

Write = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("ray_cluster")


def ran(store: Path) -> Counter[str]:
    return Counter(stage for stage, *_ in journal(store))


def test_trials_share_what_their_values_do_not_touch(write_campaign: Write, tmp_path: Path) -> None:
    """Two u and three v: one SFT model, two forgotten ones, six learned ones; one more evaluation of what all share."""
    campaign = load_campaign(write_campaign())
    found = run(campaign)
    assert ran(tmp_path / "store") == {"sft": 1, "forget": 2, "learn": 6, "evaluate": 7}
    stages = {one["stage"]: (one["ran"], one["reused"]) for one in found.summary["stages"]}
    assert stages == {"sft": (1, 5), "forget": (2, 4), "learn": (6, 0), "evaluate": (7, 5)}
    assert found.summary["trials"] == {"asked": 6, "finished": 6}
    assert found.summary["objective"]["start"] == 0.5
    best = found.summary["best"]
    assert best["values"] == {"u": 0.9, "v": 0.2}
    assert best["metrics"]["held-out accuracy"] == pytest.approx(0.5 + 0.2 - 0.025 + 0.2)
    assert best["metrics"]["KL"] == pytest.approx(0.375)


def test_the_best_config_is_a_run_whose_stages_are_all_there(write_campaign: Write) -> None:
    """A lone run of best.yaml has the trial's keys, so its result is the trial's."""
    campaign = load_campaign(write_campaign())
    found = run(campaign)
    config = load(found.folder / "best.yaml")
    assert config.name == "thresholds-best"
    planned = pipeline.plan(graph(config), Store(config.store))
    assert all(item.artifact is not None for item in planned)
    [record] = [record for record in Records(found.folder) if record.number == found.data.best]
    assert record.artifacts["evaluate"] == f"evaluate/{planned[-1].key}"


def test_what_a_campaign_leaves(write_campaign: Write) -> None:
    found = run(load_campaign(write_campaign(constraints=[{"metric": "kl", "below": 0.3}])))
    table = pq.read_table(found.folder / "trials.parquet")
    assert table.column_names[5:] == ["u", "v", "held-out accuracy", "KL"]
    assert (table.schema.metadata or {})[b"allo_ray.table"] == b"trials"
    rows = table.to_pylist()
    assert [row["broke"] for row in rows] == [row["KL"] > 0.3 for row in rows]
    best = max((row for row in rows if not row["broke"]), key=lambda row: row["held-out accuracy"])
    assert found.summary["best"]["number"] == best["number"]
    assert any(row["broke"] for row in rows)
    page = (found.folder / "report.html").read_text()
    assert "KL below 0.3" in page
    assert "extends" not in page
    assert json.loads((found.folder / "summary.json").read_text()) == found.summary


def test_more_trials_than_fit_all_end_and_never_too_many_run(write_campaign: Write, tmp_path: Path) -> None:
    """Six CPUs; a trial takes two trainers: three fit, and leave no CPU to anybody else; six are to run."""
    assert ray.cluster_resources()["CPU"] == 6
    resources = {"trainer.workers": 2, "learn.weight_decay": 4.0}
    found = run(load_campaign(write_campaign(set=resources, concurrent=6)))
    assert found.summary["trials"]["finished"] == 6
    spans = [(start, end) for stage, _, _, start, end in journal(tmp_path / "store") if stage == "learn"]
    at_once = [sum(start <= moment < end for start, end in spans) for moment, _ in spans]
    assert max(at_once) == 3


def test_a_trial_that_does_not_fit_is_told_at_once(write_campaign: Write) -> None:
    campaign = load_campaign(write_campaign(set={"trainer.workers": 4, "trainer.num_cpus": 2}))
    started = time.monotonic()
    with pytest.raises(UserError, match=r"needs 8 CPUs .*the cluster has 6 CPUs .*Lower trainer\.workers"):
        run(campaign)
    assert time.monotonic() - started < 10


def test_failed_trials_do_not_stop_the_others(write_campaign: Write, tmp_path: Path) -> None:
    """A user's mistake ends a trial at once; another error is tried again, and kept with its trace."""
    space = {"v": "grid(0.2, 0.85, 0.95)"}
    found = run(load_campaign(write_campaign(space=space)))
    records = {record.values["v"]: record for record in Records(found.folder)}
    assert [records[v].state for v in (0.2, 0.85, 0.95)] == ["finished", "failed", "failed"]
    assert "broken on purpose" in records[0.85].error
    assert records[0.95].error == "learn.v: too much"
    rows = pq.read_table(found.folder / "trials.parquet").to_pylist()
    assert [row["error"] for row in rows if row["v"] in (0.2, 0.95)] == [None, "learn.v: too much"]


@pytest.mark.parametrize("searcher", ["tpe", "random"])
def test_a_finished_campaign_goes_on_with_more_trials(
    write_campaign: Write, tmp_path: Path, searcher: str
) -> None:
    """What is there stays; new trials get new values, those of random search as if it had been asked at once."""
    space = {"k1": "loguniform(0.01, 0.3)", "v": "uniform(0, 0.6)"}
    told = {"searcher": searcher, "space": space}
    first = run(load_campaign(write_campaign(**told, trials=3)))
    values = {record.number: record.values for record in Records(first.folder)}
    second = run(load_campaign(write_campaign(**told, trials=5)))
    assert second.folder == first.folder
    again = {record.number: record.values for record in Records(second.folder)}
    assert {number: again[number] for number in values} == values
    assert len({tuple(drawn.values()) for drawn in again.values()}) == 5
    assert ran(tmp_path / "store")["learn"] == 5


def test_another_campaign_of_the_same_name_gets_its_own_folder(write_campaign: Write) -> None:
    first = run(load_campaign(write_campaign()))
    changed = load_campaign(write_campaign(set={"learn.beta": 0.2}))
    assert folder_of(changed) == first.folder.with_name("thresholds-2")
    assert folder_of(load_campaign(write_campaign(concurrent=1, set={"trainer.workers": 2}))) == first.folder
    assert folder_of(load_campaign(first.folder / "campaign.resolved.yaml")) == first.folder


def test_asha_stops_trials_after_forgetting(write_campaign: Write, tmp_path: Path) -> None:
    """One at a time, best first: of the forgotten models only the first is among the best half so far."""
    space = {"u": "grid(0.9, 0.8, 0.7, 0.6)", "v": "grid(0.2, 0.4)"}
    told = {"space": space, "scheduler": "asha", "keep": 0.5, "concurrent": 1}
    found = run(load_campaign(write_campaign(**told)))
    states = {tuple(record.values.values()): record.state for record in Records(found.folder)}
    assert states == {
        (u, v): "finished" if u == 0.9 else "stopped early" for u in (0.9, 0.8, 0.7, 0.6) for v in (0.2, 0.4)
    }
    assert ran(tmp_path / "store")["learn"] == 2
    assert found.summary["trials"] == {"asked": 8, "finished": 2, "stopped early": 6}
    again = run(load_campaign(write_campaign(**told | {"space": space | {"u": "grid(0.9, 0.8, 0.7, 0.6)"}})))
    assert again.summary["trials"] == found.summary["trials"]


def test_trackers_that_close_slowly_cost_no_trial(write_campaign: Write, tmp_path: Path) -> None:
    """ASHA ends every trial itself, the finished one too, while its trackers are open. They take longer to close than
    Tune would wait before it gives the process to the next trial; and none of the trials has failed."""
    (tmp_path / "closed.txt").touch()
    space = {"u": "grid(0.9, 0.8, 0.7)", "v": "grid(0.2, 0.4)"}
    told = {"space": space, "scheduler": "asha", "keep": 0.5, "concurrent": 1}
    found = run(load_campaign(write_campaign(**told, set={"track": {"tensorboard": {}}})))
    assert found.summary["trials"] == {"asked": 6, "finished": 2, "stopped early": 4}
    assert set((tmp_path / "closed.txt").read_text().split()) == {"False"}


def test_two_objectives_give_a_front(write_campaign: Write) -> None:
    second = {"metric": "kl", "goal": "minimise"}
    found = run(load_campaign(write_campaign(second=second)))
    rows = pq.read_table(found.folder / "trials.parquet").to_pylist()
    front = {
        row["number"]
        for row in rows
        if not any(
            (other["held-out accuracy"], -other["KL"]) != (row["held-out accuracy"], -row["KL"])
            and other["held-out accuracy"] >= row["held-out accuracy"]
            and other["KL"] <= row["KL"]
            for other in rows
        )
    }
    assert set(found.summary["front"]) <= front
    assert found.summary["front"]


def test_trackers_know_what_trials_share_and_each_trial_of_its_own(write_campaign: Write) -> None:
    """The campaign has the curve of the SFT stage; each trial those of its own stages, computed by it or not."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = run(load_campaign(write_campaign(set={"track": {"tensorboard": {}}})))

    def told(folder: Path) -> dict[str, float]:
        board = EventAccumulator(str(folder / "tensorboard"))
        board.Reload()
        return {name: board.Scalars(name)[0].value for name in board.Tags()["scalars"]}

    assert told(found.folder) == {"sft/loss": 0.5}
    for record in Records(found.folder):
        values = told(found.folder / "tracked" / f"thresholds-{record.number:04d}")
        assert values["forget/loss"] == pytest.approx(record.values["u"])
        assert values["learn/loss"] == 0.5
        assert "sft/loss" not in values
        expected = record.scores["ALLO"]["held-out"]["accuracy"]
        assert values["final/held-out/ALLO"] == pytest.approx(expected)
        assert values["final/kl/SFT"] == 0


class Driver:
    """A campaign in a process of its own on the session's cluster."""

    def __init__(self, campaign: Path) -> None:
        address = ray.get_runtime_context().gcs_address
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.tune.stages", str(campaign), address],
            cwd=Path(__file__).resolve().parents[2],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # What a shell starts in the background ignores Ctrl-C, and its children too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def end_once(self, condition: Callable[[], bool], how: signal.Signals) -> str:
        """Sends the signal as soon as `condition` holds; returns what the process said on stderr."""
        deadline = time.monotonic() + 240
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[1][-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(self.process.pid, how)
        return self.process.communicate(timeout=120)[1]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_campaign_goes_on(write_campaign: Write, tmp_path: Path, how: signal.Signals) -> None:
    """Ended while trials learn: finished ones stay as they are, and running ones keep their forgotten models."""
    file = write_campaign(set={"learn.weight_decay": 2.0}, concurrent=2)
    campaign, store = load_campaign(file), tmp_path / "store"

    def states() -> Counter[str]:
        return Counter(record.state for record in Records(folder_of(campaign)))

    def in_the_middle() -> bool:
        return states()["finished"] >= 2 and states()["running"] == 2 and ran(store)["forget"] == 2

    driver = Driver(file)
    said = driver.end_once(in_the_middle, how)
    if how == signal.SIGINT:
        assert "stopped; run the same command again to go on from here" in said.splitlines()
        assert driver.process.returncode == 130
        summary = json.loads((folder_of(campaign) / "summary.json").read_text())
        assert summary["trials"]["finished"] >= 2, "what is known is written down"
    before = {record.number: record for record in Records(folder_of(campaign)) if record.state == "finished"}
    values = {record.number: record.values for record in Records(folder_of(campaign))}
    assert 2 <= len(before) < 6
    found = run(campaign)
    after = {record.number: record for record in Records(found.folder)}
    assert {name: after[name] for name in before} == before
    assert {name: after[name].values for name in values} == values
    assert found.summary["trials"] == {"asked": 6, "finished": 6}
    assert (ran(store)["sft"], ran(store)["forget"]) == (1, 2)
    done: dict[str, Any] = Counter(key for stage, key, *_ in journal(store) if stage == "learn")
    assert len(done) == 6
    assert found.summary["best"]["values"] == {"u": 0.9, "v": 0.2}


class FirstHolder(threading.Thread):
    """Sends SIGKILL to the process of the first trial that forgets, once another trial has been waiting for a while."""

    def __init__(self, store: Path) -> None:
        super().__init__(daemon=True)
        self.store, self.killed = store, (0, 0.0)

    def run(self) -> None:
        deadline = time.monotonic() + 120
        while not forgettings(self.store) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(2.5)
        _, pid, _ = forgettings(self.store)[0]
        os.kill(pid, signal.SIGKILL)
        self.killed = pid, time.time()


def test_a_stage_that_trials_share_is_never_computed_twice_at_a_time(
    write_campaign: Write, tmp_path: Path
) -> None:
    """Two v, one u: both trials need one forgotten model. The first dies over it: begun twice, finished once."""
    store = tmp_path / "store"
    told = {"space": {"u": "grid(0.7, 0.9)", "v": "grid(0.2, 0.4)"}, "concurrent": 2}
    killer = FirstHolder(store)
    killer.start()
    found = run(load_campaign(write_campaign(**told, set={"forget.weight_decay": 4.0})))
    killer.join(10)
    assert found.summary["trials"] == {"asked": 4, "finished": 4}
    dead, when = killer.killed
    ended = {(key, pid): end for stage, key, pid, _, end in journal(store) if stage == "forget"}
    assert Counter(key for key, _ in ended).most_common(1)[0][1] == 1, (
        "each forgotten model was finished once"
    )
    attempts = forgettings(store)
    assert sorted(Counter(key for key, *_ in attempts).values()) == [1, 2]
    assert (attempts[0][0], dead) not in ended
    for key in {key for key, *_ in attempts}:
        spans = sorted((start, ended.get((key, pid), when)) for one, pid, start in attempts if one == key)
        assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:], strict=False))
