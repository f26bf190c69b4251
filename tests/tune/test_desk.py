"""Trials that come together share one start of the engines."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from allo_ray import tables
from allo_ray.config.engine import EngineConfig
from allo_ray.data.inference import Job
from allo_ray.data.inference_work import SampleWork
from allo_ray.data.tokenise import Tokeniser
from allo_ray.engines.base import Sampling
from allo_ray.errors import UserError
from allo_ray.stages.answers import Asked
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
        self.busy = threading.Event()

    def __call__(self, together: Asked, *_: Any) -> float:
        self.starts.append([key for _, key in together])
        self.busy.set()
        if "bad" in self.starts[-1]:
            raise UserError("the model does not start")
        time.sleep(self.startup + 0.001 * sum(len(job.rows) for job in together.values()))  # type: ignore[arg-type]
        self.busy.clear()
        return self.startup


def test_small_calls_wait_for_each_other_and_large_ones_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A start takes 1 s, 10 rows 10 ms. Calls 1 and 2 come while 0 starts, and 3 at its end: one start for the three.
    Call 4 alone waits two seconds for company. Call 6 has 2 s of work: it starts at once, and takes call 5 along, which
    waited."""
    engines, store = Engines(1.0), str(tmp_path)
    monkeypatch.setattr(desk, "answer", engines)
    at = Desk()
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(at.answer, asked(0), ENGINE, store)]
        assert engines.busy.wait(5)
        calls += [pool.submit(at.answer, asked(number), ENGINE, store) for number in (1, 2)]
        calls[0].result()
        calls.append(pool.submit(at.answer, asked(3), ENGINE, store))
        assert [call.result() for call in calls] == [1.0] * 4
        assert [sorted(keys) for keys in engines.starts] == [["0"], ["1", "2", "3"]]
        began = time.monotonic()
        small = pool.submit(at.answer, asked(4), ENGINE, store)
        small.result()
        assert time.monotonic() - began > 2.9
        small = pool.submit(at.answer, asked(5), ENGINE, store)
        time.sleep(0.2)
        large = pool.submit(at.answer, asked(6, 2000), ENGINE, store)
        large.result()
        assert small.result() == 1.0
        assert sorted(engines.starts[-1]) == ["5", "6"]


def test_one_trials_error_is_not_anothers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two calls share a start that fails: each is tried alone, and only the bad one fails."""
    engines, store = Engines(0.2), str(tmp_path)
    monkeypatch.setattr(desk, "answer", engines)
    at = Desk()
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(at.answer, asked(0), ENGINE, store)
        assert engines.busy.wait(5)
        good = pool.submit(at.answer, asked(1), ENGINE, store)
        bad = pool.submit(
            at.answer, {("answers", "bad"): Job(pa.table({"id": ["0"]}), "m", WORK, "")}, ENGINE, store
        )
        assert first.result() == good.result() == 0.2
        with pytest.raises(UserError, match="does not start"):
            bad.result()


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

    def trial(number: int) -> float:
        out = str(store.work_folder("answers", f"{number}") / tables.SAMPLES.name)
        return opened({("answers", f"{number}"): Job(rows, str(tiny_llama), WORK, out)}, ENGINE, store, None)  # type: ignore[arg-type]

    with ThreadPoolExecutor(2) as pool:
        assert all(seconds > 0 for seconds in pool.map(trial, range(2)))
    for number in range(2):
        found = store.find("answers", f"{number}")
        assert found is not None
        assert len(tables.SAMPLES.read(found.file(tables.SAMPLES.name))) == 3
    twice = {
        ("answers", "2"): Job(pa.concat_tables([rows, rows]), str(tiny_llama), WORK, f"{tmp_path}/twice")
    }
    with pytest.raises(UserError, match=r"^\S+twice: 3 ids of the input occur more than once"):
        opened(twice, ENGINE, store, None)  # type: ignore[arg-type]
