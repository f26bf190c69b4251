"""Trials that come together share one start of the engines, or of the trainers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from allo_ray import tables
from allo_ray.config.engine import EngineConfig
from allo_ray.config.train import TrainConfig, TrainerConfig
from allo_ray.data.inference import Job
from allo_ray.data.inference_work import SampleWork
from allo_ray.data.tokenise import Tokeniser
from allo_ray.engines.base import Sampling
from allo_ray.errors import UserError
from allo_ray.spent import Spent
from allo_ray.stages.answers import Asked
from allo_ray.store import Store
from allo_ray.train.job import TrainJob
from allo_ray.tune import desk
from allo_ray.tune.beside import beside_driver
from allo_ray.tune.desk import AtTheDesk, Desk, Pace

WORK = SampleWork(Sampling(temperature=0, max_tokens=4), 1, 0)
ENGINE = EngineConfig.model_validate(
    {"kind": "transformers", "dtype": "float32", "max_model_len": 64, "pool": {"actors": 1, "num_cpus": 1}}
)

JOB = TrainJob("", (), None, "", "sft", TrainConfig(lr=1e-3, batch_size=8), TrainerConfig(), "")


def asked(number: int, rows: int = 10) -> Asked:
    return {("answers", f"{number}"): Job(pa.table({"id": [str(row) for row in range(rows)]}), "m", WORK, "")}


class Engines:
    """In the place of real ones: takes `startup` seconds and 1 ms a row, and notes which keys come together."""

    def __init__(self, startup: float) -> None:
        self.startup = startup
        self.starts: list[list[str]] = []

    def __call__(self, together: Asked, engine: EngineConfig, store: Store) -> Spent:
        missing = [place for place in together if store.find(*place) is None]
        if not missing:
            return Spent(0.0)
        self.starts.append(sorted(key for _, key in missing))
        if "bad" in self.starts[-1]:
            raise UserError("the model does not start")
        time.sleep(self.startup + 0.001 * sum(len(job.rows) for job in together.values()))  # type: ignore[arg-type]
        for stage, key in missing:
            store.work_folder(stage, key)
            store.publish(stage, key, {"facts": {}, "seconds": 0, "startup_seconds": 0})
        return Spent(self.startup)


def test_small_calls_wait_for_each_other_and_large_ones_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A start takes 1 s, a row 1 ms. Three calls of 10 rows come while the first one waits its three seconds: one
    start, of which each bears a third. A call of 4,000 rows starts at once and takes along what waits. A small one that
    comes then waits its three seconds, and starts beside it."""
    engines, store, at = Engines(1.0), str(tmp_path), Desk(8, 99, Pace(1.0, 0.001), Pace())
    monkeypatch.setattr(desk, "answer", engines)

    def call(number: int, rows: int = 10) -> Future[Spent]:
        return pool.submit(at.answer, asked(number, rows), ENGINE, store)

    with ThreadPoolExecutor(8) as pool:
        began = time.monotonic()
        for spent in [one.result() for one in [call(0), call(1), call(2)]]:
            assert spent.startup == pytest.approx(1 / 3)
            assert spent.waited == pytest.approx(3 + 2 / 3, abs=0.5)
        assert time.monotonic() - began > 3.9
        small = call(3)
        time.sleep(0.2)
        large = call(4, 4000)
        time.sleep(0.2)
        late = call(5)
        assert large.result().startup == small.result().startup == 0.5
        assert large.result().waited < 1
        assert late.result().startup == 1
    assert engines.starts == [["0", "1", "2"], ["3", "4"], ["5"]]


def test_what_is_asked_again_is_not_done_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A trial that was lost while its questions were being answered asks them again: it gets what is published then."""
    engines, store, at = Engines(1.0), str(tmp_path), Desk(8, 99, Pace(), Pace())
    monkeypatch.setattr(desk, "answer", engines)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(at.answer, asked(0), ENGINE, store)
        time.sleep(0.3)
        again = pool.submit(at.answer, asked(0), ENGINE, store)
        assert first.result().startup == 1
        assert again.result().startup == 0
    assert engines.starts == [["0"]]


def test_one_trials_error_is_not_anothers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two calls share a start that fails: each is tried alone, and only the bad one fails."""
    engines, store, at = Engines(0.2), str(tmp_path), Desk(8, 99, Pace(0.5, 0.001), Pace())
    monkeypatch.setattr(desk, "answer", engines)
    bad_one = {("answers", "bad"): Job(pa.table({"id": ["0"]}), "m", WORK, "")}
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(at.answer, asked(1), ENGINE, store)
        bad = pool.submit(at.answer, bad_one, ENGINE, store)
        assert good.result().startup == 0.2
        with pytest.raises(UserError, match="does not start"):
            bad.result()
    assert sorted(map(len, engines.starts)) == [1, 1, 2]


def trained(at: Desk, number: int, rows: int = 8) -> Spent:
    """Has a job of so many rows trained."""
    return at.fit(replace(JOB, out=f"{number}"), rows // 8)


class Trainers:
    """In the place of real ones: take a second, and 10 ms a row; note which jobs come together."""

    def __init__(self) -> None:
        self.starts: list[list[str]] = []

    def __call__(self, jobs: Sequence[tuple[TrainJob, int]]) -> list[Spent]:
        self.starts.append([job.out for job, _ in jobs])
        if len(jobs) > 1 and any(job.out == "13" for job, _ in jobs):
            raise RuntimeError("out of memory")
        own = [0.08 * steps for _, steps in jobs]
        time.sleep(1 + sum(own))
        return [Spent(1 / len(jobs), sum(own) - one + 1 - 1 / len(jobs)) for one in own]


def test_small_trainings_share_workers_and_nobody_waits_for_who_cannot_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four trials at most, a start takes 1 s and a row 10 ms. Once all four wait for a training of 8 rows they begin,
    and each bears a quarter of the start. Two of 104 rows take longer than a start, so each begins at once, alone."""
    trainers, at = Trainers(), Desk(4, 99, Pace(), Pace(1.0, 0.01))
    monkeypatch.setattr(desk, "fit_all", trainers)
    with ThreadPoolExecutor(4) as pool:
        began = time.monotonic()
        for spent in pool.map(lambda number: trained(at, number), range(4)):
            assert spent.startup == 0.25
            assert spent.waited == pytest.approx(1 - 0.25 + 3 * 0.08, abs=0.4)
        assert time.monotonic() - began < 2.5
        assert sorted(trainers.starts.pop()) == ["0", "1", "2", "3"]
        large = [pool.submit(trained, at, number, 104) for number in (4, 5)]
        assert [one.result().startup for one in large] == [1, 1]
        assert sorted(trainers.starts) == [["4"], ["5"]]


@pytest.mark.parametrize("elsewhere", ["away", "ended"])
def test_nobody_waits_for_trials_that_bring_nothing(monkeypatch: pytest.MonkeyPatch, elsewhere: str) -> None:
    """Of four trials two wait for the forgotten models of the others, or have ended: those two begin at once."""
    trainers, at = Trainers(), Desk(4, 4, Pace(), Pace(1.0, 0.01))
    monkeypatch.setattr(desk, "fit_all", trainers)
    if elsewhere == "away":
        at.away(2)
    else:
        at.ended()
        at.ended()
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        assert [spent.startup for spent in pool.map(lambda number: trained(at, number), range(2))] == [
            0.5,
            0.5,
        ]
    assert time.monotonic() - began < 2.5


def test_no_more_is_trained_in_turn_than_fills_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """While three trainings of 88 rows, 0.88 s each, are taken along, 3 s are not full; with a fourth they would be."""
    at = Desk(4, 99, Pace(), Pace(1.0, 0.01))
    calls = [desk._Call(desk._train, TrainerConfig(), None, {number}, 88) for number in range(4)]
    at._waiting = calls
    assert at._together(calls[3]) == [calls[3], calls[0], calls[1]]
    calls[0].units = 104  # 1.04 s, more than a start takes: begins on its own
    assert at._together(calls[3]) == [calls[3], calls[1], calls[2]]


def test_workers_that_fail_with_several_jobs_get_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they do not fit into memory, alone they do."""
    trainers, at = Trainers(), Desk(2, 99, Pace(), Pace(1.0, 0.01))
    monkeypatch.setattr(desk, "fit_all", trainers)
    with ThreadPoolExecutor(2) as pool:
        assert [spent.startup for spent in pool.map(lambda number: trained(at, number), (12, 13))] == [1, 1]
    assert sorted(map(len, trainers.starts)) == [1, 1, 2]


@pytest.mark.usefixtures("ray_cluster")
def test_answers_are_published_for_each_trial(tiny_llama: Path, tmp_path: Path) -> None:
    """The desk as an actor, a real engine that two trials share: an artifact for each; a user's error reads as one."""
    store, tokeniser = Store(str(tmp_path / "store")), Tokeniser(str(tiny_llama))
    empty = dict.fromkeys(tables.PROMPTS.schema.names)
    rows = tables.PROMPTS.build(
        [
            empty | {"id": str(at), "prompt": "x", "prompt_ids": tokeniser.prompt(f"{at} + {at} =")}
            for at in range(3)
        ]
    )
    opened = AtTheDesk(beside_driver(Desk, 2, 99, Pace(5.0, 0.0), Pace(0.0, 0.0), max_concurrency=2))

    def trial(number: int) -> Spent:
        out = str(store.work_folder("answers", f"{number}") / tables.SAMPLES.name)
        return opened.answer({("answers", f"{number}"): Job(rows, str(tiny_llama), WORK, out)}, ENGINE, store)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(trial, range(2))
        assert one.startup == other.startup > 0
    for number in range(2):
        found = store.find("answers", f"{number}")
        assert found is not None
        assert len(tables.SAMPLES.read(found.file(tables.SAMPLES.name))) == 3
    twice = {
        ("answers", "2"): Job(pa.concat_tables([rows, rows]), str(tiny_llama), WORK, f"{tmp_path}/twice")
    }
    with pytest.raises(UserError, match=r"^\S+twice: 3 ids of the input occur more than once"):
        opened.answer(twice, ENGINE, store)
