"""Batch jobs on vLLM give equal results whatever the batches, actors and deaths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import cloudpickle

from allo_ray import tables
from allo_ray.data.inference import Job, run
from allo_ray.data.inference_work import SCORES, Answers, SampleWork, ScoreWork
from allo_ray.engines.base import Engine, Sampling
from tests.data.inference_jobs import PROMPTS, SAMPLING, engine, prompts, samples

cloudpickle.register_pickle_by_value(sys.modules[__name__])

#: Largest difference of a log-prob between two cuts of the same rows into batches, in float32: that of two engines.
SCORE_TOLERANCE = 2e-5
#: What both works of a run read from the rows of `prompts`, so that one pool of engines serves both.
COLUMNS = ("id", "prompt", "prompt_ids", "answer", "context_ids", "response_ids")


def scores(out: Path) -> dict[str, np.ndarray]:
    """Id -> log-probs [R] of all rows of all shards; none is there twice."""
    raw = SCORES.read(out).to_pylist()
    told = {row["id"]: np.array(row["logprobs"], np.float32) for row in raw}
    assert len(told) == len(raw)
    return told


@dataclass(frozen=True)
class Mortal(SampleWork):
    """Sampling whose process dies, as if by kill -9, whenever it meets certain prompts."""

    poison: tuple[str, ...] = ()

    def answer(self, engine: Engine, rows: Any) -> Answers:
        if any(row["id"] in self.poison for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().answer(engine, rows)


@dataclass(frozen=True)
class Patient(SampleWork):
    """Its batches wait until so many processes work on the job (at most two minutes)."""

    marks: str = ""
    processes: int = 1
    columns = COLUMNS

    def answer(self, engine: Engine, rows: Any) -> Answers:
        (Path(self.marks) / str(os.getpid())).touch()
        patience = time.monotonic() + 120
        while len(list(Path(self.marks).iterdir())) < self.processes and time.monotonic() < patience:
            time.sleep(0.1)
        return super().answer(engine, rows)


@dataclass(frozen=True)
class Scored(ScoreWork):
    columns = COLUMNS


def both(model: Path | str, out: Path, processes: int = 1) -> list[Job]:
    """Two samples of every prompt, and the log-probs of every response."""
    (out / "marks").mkdir(parents=True, exist_ok=True)
    work = Patient(SAMPLING, 2, 3, marks=str(out / "marks"), processes=processes)
    return [
        Job(prompts(), str(model), work, str(out / "samples"), "m"),
        Job(prompts(), str(model), Scored(logprobs=True), str(out / "scores"), "m"),
    ]


@dataclass(frozen=True)
class Truth:
    """What a run that nothing disturbs gives."""

    samples: list[dict[str, Any]]
    scores: dict[str, np.ndarray]

    def check(self, out: Path) -> None:
        """Fails unless the same is in the folder: samples to the byte, scores within the tolerance."""
        assert samples(out / "samples") == self.samples
        found = scores(out / "scores")
        assert found.keys() == self.scores.keys()
        for name, expected in self.scores.items():
            np.testing.assert_allclose(found[name], expected, atol=SCORE_TOLERANCE, rtol=0)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    """vLLM, batches of 64, one actor: what every other run must equal.

    The second sample of a prompt of L tokens finds all its whole blocks in the cache but the one of its last token:
    32 ((L - 1) // 32) tokens.
    """
    out = tmp_path_factory.mktemp("undisturbed")
    facts = run(both(tiny_qwen, out), engine("vllm", 64))
    rows = samples(out / "samples")
    assert [told["rows"] for told in facts] == [PROMPTS, PROMPTS]
    assert facts[0]["tokens_out"] == sum(len(row["response_ids"]) for row in rows)
    assert [(row["prompt_id"], row["index"]) for row in rows] == [
        (f"p{i:03d}", k) for i in range(PROMPTS) for k in (0, 1)
    ]
    assert len({row["id"] for row in rows}) == len(rows)
    found = scores(out / "scores")
    lengths = {row["id"]: len(row["response_ids"]) for row in prompts().to_pylist()}
    assert {name: len(told) for name, told in found.items()} == lengths
    assert facts[0]["cached"] > 0
    return Truth(rows, found)


class Seen:
    """Remembers what a job tells while it runs."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, dict[str, Any]]] = []

    def update(self, done: int, total: int, unit: str, **facts: Any) -> None:
        self.told.append((done, total, facts))


@pytest.mark.parametrize(("batch", "actors"), [(1, 1), (7, 2), (64, 2)])
def test_batches_and_actors_change_nothing(
    batch: int, actors: int, undisturbed: Truth, tiny_qwen: Path, tmp_path: Path
) -> None:
    """Beside one actor and batches of 64. All actors take part, and tell what the engines do."""
    config, seen = engine("vllm", batch, actors=actors, batches_in_flight=1), Seen()
    facts = run(both(tiny_qwen, tmp_path, actors), config, seen)
    undisturbed.check(tmp_path)
    assert facts[0]["actors"] == actors
    assert len(list(tmp_path.glob("samples/*.parquet"))) >= PROMPTS / max(1, batch // 2)
    done, total, told = seen.told[-1]
    assert done == total == 2 * PROMPTS
    assert set(told) == {"running", "waiting", "cached", "tokens_in_per_second", "tokens_out_per_second"}


DRIVER = """
    import os, signal, sys
    from dataclasses import replace
    from pathlib import Path
    import ray
    sys.path.insert(0, {root!r})
    from tests.data.inference_jobs import engine
    from tests.data.test_equal_results import both
    from allo_ray.data.inference import run

    class DieInSampling:
        def update(self, done, total, unit, **facts):
            if done > 10:
                os.kill(os.getpid(), signal.SIGKILL)

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    sampling, scoring = both({model!r}, Path({out!r}))
    scoring = replace(scoring, rows=scoring.rows.slice(5, 10))
    run([scoring, sampling], engine("vllm", 2, batches_in_flight=1), DieInSampling())
"""


def test_killed_driver_resumes(undisturbed: Truth, tiny_qwen: Path, tmp_path: Path) -> None:
    """SIGKILL of the driver after 10 scores and its first sampled prompt; a second run with other batches goes on."""
    root = str(Path(__file__).parents[2])
    script = textwrap.dedent(DRIVER.format(root=root, model=str(tiny_qwen), out=str(tmp_path)))
    killed = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    there = len(tables.SAMPLES.read(tmp_path / "samples"))  # the engines may live a moment longer
    assert 2 <= there < len(undisturbed.samples)
    facts = run(both(tiny_qwen, tmp_path), engine("vllm", 64))
    assert facts[0]["skipped"] * 2 >= there, "what was there is not done again"
    assert facts[1]["skipped"] == 10
    undisturbed.check(tmp_path)


def test_a_poison_row_is_given_up_and_the_rest_goes_on(
    undisturbed: Truth, tiny_qwen: Path, tmp_path: Path
) -> None:
    """A row kills every vLLM engine that meets it, with another batch under way beside it: it alone is given up.

    All others are answered as if nothing had been; a second run leaves the row given up.
    """
    job = Job(prompts(12), str(tiny_qwen), Mortal(SAMPLING, 2, 3, poison=("p002",)), str(tmp_path), "m")
    facts = run([job], engine("vllm", 8))[0]
    assert facts["killed"] == facts["rejected"] == facts["rejected_total"] == 1
    [given_up] = job.shards.rejected()
    assert (given_up.id, given_up.kind) == ("p002", "killed")
    assert "died" in given_up.reason
    rest = [f"p{i:03d}" for i in range(12) if i != 2]
    assert samples(tmp_path) == [row for row in undisturbed.samples if row["prompt_id"] in rest]
    again = run([job], engine("vllm", 8))[0]
    assert (again["skipped"], again["rejected"], again["rejected_total"]) == (12, 0, 1)


def test_an_actor_joins_while_the_job_runs(ray_cluster: None, tiny_qwen: Path, tmp_path: Path) -> None:
    """A pool of one to two actors: batches queue up at the first, so a second is started and takes its share."""
    (tmp_path / "marks").mkdir()
    work = Patient(Sampling(temperature=0, max_tokens=2), 1, 0, marks=str(tmp_path / "marks"), processes=2)
    job = Job(prompts(24), str(tiny_qwen), work, str(tmp_path / "out"))
    assert run([job], engine(batch=2, actors=(1, 2)))[0]["actors"] == 2
    assert len(samples(tmp_path / "out")) == 24
