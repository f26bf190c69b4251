"""Trials that come together share one start of the engines, or of the trainers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import ray

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


def test_small_calls_wait_for_each_other_and_large_ones_are_handed_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A start takes 1 s, a row 1 ms. Three calls of 10 rows come while the first one waits its three seconds: one
    start, of which each bears a third. A call of 4,000 rows does not wait, and makes no small one begin."""
    engines, store, at = Engines(1.0), str(tmp_path), Desk(8, Pace(1.0, 0.001), Pace())
    monkeypatch.setattr(desk, "answer", engines)

    def call(number: int, rows: int = 10) -> Future[Spent | None]:
        return pool.submit(at.answer, number, asked(number, rows), ENGINE, store)

    with ThreadPoolExecutor(8) as pool:
        began = time.monotonic()
        calls = [call(0), call(1), call(2)]
        assert call(3, 4000).result() is None
        assert time.monotonic() - began < 1
        for one in calls:
            spent = one.result()
            assert spent
            assert spent.startup == pytest.approx(1 / 3)
            assert spent.waited == pytest.approx(3 + 2 / 3, abs=0.5)
        assert time.monotonic() - began > 3.9
    assert engines.starts == [["0", "1", "2"]]


def test_small_calls_that_fill_a_start_begin_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """600 rows take 0.6 s; two such calls take longer than a start of 1 s."""
    engines, store, at = Engines(1.0), str(tmp_path), Desk(8, Pace(1.0, 0.001), Pace())
    monkeypatch.setattr(desk, "answer", engines)
    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda number: at.answer(number, asked(number, 600), ENGINE, store), range(2)))
    assert time.monotonic() - began < 3
    assert engines.starts == [["0", "1"]]


@pytest.mark.parametrize("startup", [0.0, 1.0])
def test_what_is_asked_again_is_not_done_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, startup: float
) -> None:
    """A trial that was lost while its questions were being answered asks them again: it gets what is published then,
    also where they would be large by now."""
    engines, store, at = Engines(1.0), str(tmp_path), Desk(1, Pace(1.0, 0.001), Pace())
    monkeypatch.setattr(desk, "answer", engines)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(at.answer, 0, asked(0), ENGINE, store)
        time.sleep(0.3)
        at._paces[desk._answer] = Pace(startup, 0.001)
        again = pool.submit(at.answer, 0, asked(0), ENGINE, store)
        assert first.result() == (1, pytest.approx(0, abs=0.2))
        assert again.result() == (0, pytest.approx(0.7, abs=0.3))
    assert engines.starts == [["0"]]


def test_one_trials_error_is_not_anothers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two calls share a start that fails: each is tried alone, and only the bad one fails."""
    engines, store, at = Engines(0.2), str(tmp_path), Desk(2, Pace(0.5, 0.001), Pace())
    monkeypatch.setattr(desk, "answer", engines)
    bad_one = {("answers", "bad"): Job(pa.table({"id": ["0"]}), "m", WORK, "")}
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(at.answer, 1, asked(1), ENGINE, store)
        bad = pool.submit(at.answer, 2, bad_one, ENGINE, store)
        assert good.result() == (0.2, pytest.approx(0, abs=0.2))
        with pytest.raises(UserError, match="does not start"):
            bad.result()
    assert sorted(map(len, engines.starts)) == [1, 1, 2]


def trained(at: Desk, number: int, rows: int = 8) -> Spent | None:
    """Has a job of so many rows trained for the trial of this number."""
    return at.fit(number, replace(JOB, out=f"{number}"), rows // 8)


def starts_of(at: Desk, numbers: Iterable[int]) -> list[float]:
    """What each of these trials bears of a start, when they come together."""
    with ThreadPoolExecutor(8) as pool:
        return [spent.startup if spent else 0.0 for spent in pool.map(partial(trained, at), numbers)]


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


def test_small_trainings_share_workers_and_large_ones_are_handed_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A start takes 1 s and a row 10 ms. Once all four trials wait for a training of 8 rows they begin, and each bears
    a quarter of the start and waits for the three others. 104 rows take longer than a start."""
    trainers, at = Trainers(), Desk(4, Pace(), Pace(1.0, 0.01))
    monkeypatch.setattr(desk, "fit_all", trainers)
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        for spent in pool.map(partial(trained, at), range(4)):
            assert spent == (0.25, pytest.approx(1 - 0.25 + 3 * 0.08, abs=0.4))
    assert time.monotonic() - began < 2.5
    assert sorted(trainers.starts.pop()) == ["0", "1", "2", "3"]
    assert trained(at, 4, 104) is None
    assert trainers.starts == []


def test_nobody_waits_for_trials_that_bring_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four trials two wait for the forgotten models of the others: those begin at once. Then there are two trials
    more, and again the two bear half of a start each. One that was away comes itself: nobody else is awaited."""
    at = Desk(4, Pace(), Pace(1.0, 0.01))
    monkeypatch.setattr(desk, "fit_all", Trainers())
    at.away(2, True)
    at.away(3, True)
    began = time.monotonic()
    assert starts_of(at, (0, 1)) == [0.5, 0.5]
    at.away(2, False)
    at.expect(3)
    assert starts_of(at, (0, 1)) == [0.5, 0.5]
    at.expect(2)
    at.away(3, True)
    assert starts_of(at, (3, 4)) == [0.5, 0.5]
    assert time.monotonic() - began < 6


def test_no_more_is_trained_in_turn_than_fills_the_patience() -> None:
    """While three trainings of 88 rows, 0.88 s each, are taken along, 3 s are not full; with a fourth they would be."""
    at = Desk(4, Pace(), Pace(1.0, 0.01))
    calls = [desk._Call(desk._train, TrainerConfig(), None, {number}, 88) for number in range(4)]
    at._waiting = calls
    assert at._together(calls[3]) == [calls[3], calls[0], calls[1]]


def test_workers_that_fail_with_several_jobs_get_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they do not fit into memory, alone they do."""
    trainers, at = Trainers(), Desk(2, Pace(), Pace(1.0, 0.01))
    monkeypatch.setattr(desk, "fit_all", trainers)
    assert starts_of(at, (12, 13)) == [1, 1]
    assert sorted(map(len, trainers.starts)) == [1, 1, 2]


def test_a_start_that_waited_for_a_node_is_no_measure() -> None:
    assert Pace.of(1200.0, 0.1) == (desk.LONGEST, 0.1)


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
    opened = AtTheDesk(
        beside_driver(Desk, 2, Pace(5.0, 0.0), Pace(), max_concurrency=2, concurrency_groups={"words": 1}),
        trial=0,
    )

    progress = SimpleNamespace(update=lambda *_, **__: None)

    def trial(number: int) -> Spent:
        out = str(store.work_folder("answers", f"{number}") / tables.SAMPLES.name)
        return opened.answer(
            {("answers", f"{number}"): Job(rows, str(tiny_llama), WORK, out)}, ENGINE, store, progress
        )

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
    opened.desk.expect.remote(1)
    with pytest.raises(UserError, match=r"^\S+twice: 3 ids of the input occur more than once"):
        opened.answer(twice, ENGINE, store, progress)
    handed_back = SimpleNamespace(answer=SimpleNamespace(remote=lambda *_: ray.put(None)))
    large = AtTheDesk(handed_back, trial=0)
    out = str(store.work_folder("answers", "3") / tables.SAMPLES.name)
    job = Job(rows, str(tiny_llama), WORK, out)
    assert large.answer({("answers", "3"): job}, ENGINE, store, progress).startup > 0
    assert store.find("answers", "3") is not None
