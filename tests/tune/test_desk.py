"""Trials that come together share one start of the engines."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from allo_ray import tables
from allo_ray.config.engine import EngineConfig
from allo_ray.data.inference import Job
from allo_ray.data.inference_work import SampleWork
from allo_ray.data.tokenise import Tokeniser
from allo_ray.engines.base import Sampling
from allo_ray.errors import UserError
from allo_ray.stages.answers import Asked, Spent
from allo_ray.store import Store
from allo_ray.tune import desk
from allo_ray.tune.desk import AtTheDesk, Desk, open_desk

WORK = SampleWork(Sampling(temperature=0, max_tokens=4), 1, 0)
ENGINE = EngineConfig.model_validate(
    {"kind": "transformers", "dtype": "float32", "max_model_len": 64, "pool": {"actors": 1, "num_cpus": 1}}
)


def asked(number: int, rows: int = 10) -> Asked:
    return {("answers", f"{number}"): Job(pa.table({"id": [str(row) for row in range(rows)]}), "m", WORK, "")}


class Engines:
    """In the place of real ones: takes `startup` seconds and 1 ms a row, and notes which keys come together."""

    def __init__(self, startup: float) -> None:
        self.startup = startup
        self.starts: list[list[str]] = []

    def __call__(self, together: Asked, engine: EngineConfig, store: Store) -> Spent:
        self.starts.append(sorted(key for _, key in together))
        if "bad" in self.starts[-1]:
            raise UserError("the model does not start")
        time.sleep(self.startup + 0.001 * sum(len(job.rows) for job in together.values()))  # type: ignore[arg-type]
        for stage, key in together:
            store.work_folder(stage, key)
            store.publish(stage, key, {"facts": {}, "seconds": 0, "startup_seconds": 0})
        return Spent(self.startup)


def test_small_calls_wait_for_each_other_and_large_ones_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A start takes 1 s, a row 1 ms. Three calls of 10 rows come while the first one waits its three seconds: one
    start, of which each bears a third. A call of 4,000 rows starts at once and takes along what waits. A small one that
    comes then waits its three seconds, and starts beside it."""
    engines, store, at = Engines(1.0), str(tmp_path), Desk(1.0, 0.001)
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
    engines, store, at = Engines(1.0), str(tmp_path), Desk()
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
    engines, store, at = Engines(0.2), str(tmp_path), Desk(0.5, 0.001)
    monkeypatch.setattr(desk, "answer", engines)
    bad_one = {("answers", "bad"): Job(pa.table({"id": ["0"]}), "m", WORK, "")}
    with ThreadPoolExecutor(2) as pool:
        good = pool.submit(at.answer, asked(1), ENGINE, store)
        bad = pool.submit(at.answer, bad_one, ENGINE, store)
        assert good.result().startup == 0.2
        with pytest.raises(UserError, match="does not start"):
            bad.result()
    assert sorted(map(len, engines.starts)) == [1, 1, 2]


@pytest.mark.usefixtures("ray_cluster")
def test_answers_are_published_for_each_trial(tiny_llama: Path, tmp_path: Path) -> None:
    """The desk as an actor, a real engine: two trials at once, an artifact for each; a user's error reads as one."""
    store, tokeniser = Store(str(tmp_path / "store")), Tokeniser(str(tiny_llama))
    empty = dict.fromkeys(tables.PROMPTS.schema.names)
    rows = tables.PROMPTS.build(
        [
            empty | {"id": str(at), "prompt": "x", "prompt_ids": tokeniser.prompt(f"{at} + {at} =")}
            for at in range(3)
        ]
    )
    opened = AtTheDesk(open_desk(2))

    def trial(number: int) -> Spent:
        out = str(store.work_folder("answers", f"{number}") / tables.SAMPLES.name)
        return opened({("answers", f"{number}"): Job(rows, str(tiny_llama), WORK, out)}, ENGINE, store, None)  # type: ignore[arg-type]

    with ThreadPoolExecutor(2) as pool:
        assert all(spent.startup > 0 for spent in pool.map(trial, range(2)))
    for number in range(2):
        found = store.find("answers", f"{number}")
        assert found is not None
        assert len(tables.SAMPLES.read(found.file(tables.SAMPLES.name))) == 3
    twice = {
        ("answers", "2"): Job(pa.concat_tables([rows, rows]), str(tiny_llama), WORK, f"{tmp_path}/twice")
    }
    with pytest.raises(UserError, match=r"^\S+twice: 3 ids of the input occur more than once"):
        opened(twice, ENGINE, store, None)  # type: ignore[arg-type]
