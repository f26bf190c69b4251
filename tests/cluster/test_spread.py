"""Two trainers and two samplers on nodes that have room for one each; a node lost under the samplers."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from allo_ray import tables
from allo_ray.data.inference import Job, run
from allo_ray.data.inference_work import Answers, SampleWork
from allo_ray.data.shards import Shards
from allo_ray.engines.base import Engine
from allo_ray.engines.transformers_engine import TransformersEngine
from tests.cluster.conftest import LocalCluster
from tests.cluster.held_training import check, train, write_rows
from tests.data.test_inference import SAMPLING, engine, prompts

cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

#: Two samples of each prompt, four prompts a batch.
PROMPTS, SAMPLES, CONFIG = 24, 2, engine(batch=8, actors=2, num_cpus=2, threads=1, batches_in_flight=1)


@dataclass(frozen=True)
class Held(SampleWork):
    """Notes the node of each batch in the folder `marks`; a node's second one waits there for the file "lost"."""

    marks: str = ""

    def answer(self, engine: Engine, rows: Any) -> Answers:
        import ray

        mine = Path(self.marks) / ray.get_runtime_context().get_node_id()
        before = mine.exists()
        mine.touch()
        while before and not mine.with_name("lost").exists():
            mine.with_suffix(".held").touch()
            time.sleep(0.1)
        return super().answer(engine, rows)


def sample(model: str, marks: str, out: str) -> None:
    """The driver of the sampling job."""
    import ray

    from allo_ray.session import quiet

    quiet()
    ray.init(log_to_driver=False)
    work = Held(SAMPLING, SAMPLES, 3, marks=marks)
    run([Job(prompts(PROMPTS), model, work, out)], CONFIG)


def test_two_trainers_on_two_nodes_train_what_one_trains(
    local_cluster: LocalCluster, tiny_llama: Path, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.parquet", 1)
    local_cluster.run("add", "other", "--num-cpus", "2")
    with local_cluster.driver(train, tmp_path / "log", tiny_llama, tmp_path, "[2, 2]", 2) as driver:
        driver.finish()
    local_cluster.run("kill", "other")
    assert check(tiny_llama, tmp_path, [2])["workers"] == 2


def test_a_node_lost_under_two_samplers_costs_no_row(
    local_cluster: LocalCluster, tiny_qwen: Path, tmp_path: Path
) -> None:
    """Both nodes have answered a batch and hold another one when the second dies; its successor does what is left.

    The rows are those of one engine that is asked everything at once.
    """
    marks, out = tmp_path / "marks", tmp_path / "samples"
    marks.mkdir()
    local_cluster.run("add", "other", "--num-cpus", "2")
    with local_cluster.driver(sample, tmp_path / "log", tiny_qwen, marks, out) as driver:
        driver.wait_for(lambda: len(list(marks.glob("*.held"))) == 2)
        there = len(list(out.glob("*.parquet")))
        local_cluster.run("kill", "other")
        local_cluster.run("add", "another", "--num-cpus", "2")
        (marks / "lost").touch()
        driver.finish()
    local_cluster.run("kill", "another")
    assert there == 2
    assert len([mark for mark in marks.iterdir() if not mark.suffix and mark.name != "lost"]) == 3
    alone = TransformersEngine(engine(), str(tiny_qwen))
    truth = SampleWork(SAMPLING, SAMPLES, 3).answer(alone, prompts(PROMPTS).to_pylist()).rows
    found = Shards(str(out), tables.SAMPLES, "prompt_id")
    assert found.read().to_pylist() == tables.SAMPLES.build(truth).to_pylist()
    assert not found.rejected()
