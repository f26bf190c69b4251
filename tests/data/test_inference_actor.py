"""What an actor does with a batch that another attempt has begun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from allo_ray import tables
from allo_ray.config.engine import EngineConfig
from allo_ray.data.inference_actor import JOB, Assignment, InferenceActor
from allo_ray.data.inference_work import SampleWork
from allo_ray.data.shards import Shards, name_of
from allo_ray.engines.base import Completion, Sampling

WORK = SampleWork(Sampling(temperature=0), 2, 0)
IDS = ["a", "b", "c"]
BATCH = pa.table({"id": IDS, "prompt": IDS, "prompt_ids": [[5]] * 3, "answer": IDS, JOB: [0] * 3})
NAME, ALONE = name_of(IDS), name_of(["alone", "b"])


class Echo:
    """Answers every request with the same word, and remembers how many requests came together."""

    max_model_len, startup_seconds = 100, 0.0

    def __init__(self) -> None:
        self.calls: list[int] = []

    def generate(self, requests: Any, sampling: Sampling) -> list[Completion]:
        self.calls.append(len(requests))
        return [Completion([7], "word", "stop") for _ in requests]

    def gauges(self) -> dict[str, float]:
        return {"running": 0, "waiting": 0, "cached_tokens": 0, "prompt_tokens": 0}


@pytest.fixture
def engine(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> Echo:
    made = Echo()
    monkeypatch.setattr("allo_ray.data.inference_actor.build_engine", lambda *_: made)
    return made


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    made = Shards(str(tmp_path), WORK.table, WORK.key)
    made.claim({})
    return made


def begun_elsewhere(shards: Shards, name: str, node: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("allo_ray.data.shards._PROCESS", f"another at {node}")
        shards.begin(name, node)


def serve(shards: Shards) -> dict[str, Any]:
    return InferenceActor(EngineConfig(), [Assignment("m", WORK, shards)])(BATCH).to_pylist()[0]


def test_an_attempt_that_was_cut_off_and_ends_late_doubles_nothing(
    engine: Echo, shards: Shards, tmp_path: Path
) -> None:
    """Its batch was begun again, row by row: both publish 3 prompts x 2 samples, under one name."""
    begun_elsewhere(shards, NAME, ray.get_runtime_context().get_node_id())
    told = serve(shards)
    assert engine.calls == [2, 2, 2]
    assert (told["rejected"], told["tokens_out"]) == (0, 6)
    shards.publish(NAME, WORK.answer(engine, BATCH.to_pylist()).rows)  # type: ignore[arg-type]
    assert len(tables.SAMPLES.read(tmp_path)) == 6


def test_a_pass_row_by_row_that_ended_half_way_goes_on(engine: Echo, shards: Shards, tmp_path: Path) -> None:
    """`a` was answered and `b` killed its engine: `b` is given up, `c` is asked, and one shard has `a` and `c`."""
    here = ray.get_runtime_context().get_node_id()
    begun_elsewhere(shards, NAME, here)
    begun_elsewhere(shards, ALONE, here)
    shards.keep(name_of(["alone", "a"]), WORK.answer(engine, BATCH.to_pylist()[:1]).rows)  # type: ignore[arg-type]
    engine.calls.clear()
    told = serve(shards)
    assert engine.calls == [2]
    assert (told["rejected"], told["killed"]) == (1, 1)
    assert [row.id for row in shards.rejected()] == ["b"]
    [shard] = tmp_path.glob("*.parquet")
    assert [row["prompt_id"] for row in tables.SAMPLES.read(shard).to_pylist()] == ["a", "a", "c", "c"]


def test_rows_of_a_lost_node_are_not_to_blame(engine: Echo, shards: Shards) -> None:
    """The node took the engine with it, in the batch and again with `b` alone: the batch is asked as any other."""
    for name in (NAME, ALONE):
        begun_elsewhere(shards, name, "gone")
    assert serve(shards)["rejected"] == 0
    assert engine.calls == [6]
