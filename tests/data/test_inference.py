"""Batch jobs: equal results whatever the batches, actors and deaths; poison rows; refusals; flat memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import cloudpickle

from allo_ray import tables
from allo_ray.config.data import VerifyConfig
from allo_ray.config.engine import EngineConfig, EngineResources
from allo_ray.data.inference import Job, run, sample, score
from allo_ray.data.inference_actor import private_bytes
from allo_ray.data.inference_work import SCORES, Answers, SampleWork, ScoreWork
from allo_ray.data.shards import Shards
from allo_ray.engines.base import Engine, Sampling
from allo_ray.engines.transformers_engine import TransformersEngine
from allo_ray.errors import UserError
from allo_ray.models import tiny_model

cloudpickle.register_pickle_by_value(sys.modules[__name__])

SAMPLING = Sampling(temperature=1.0, top_p=0.9, max_tokens=12)
PROMPTS = 40


def engine(kind: str = "transformers", batch: int = 64, **pool: Any) -> EngineConfig:
    return EngineConfig(
        kind=kind,  # type: ignore[arg-type]
        dtype="float32",
        max_model_len=256,
        pool=EngineResources(
            kv_cache_gib=0.05, max_num_batched_tokens=256, max_num_seqs=16, batch_size=batch, **pool
        ),
    )


def prompts(count: int = PROMPTS, seed: int = 0) -> pa.Table:
    draw = np.random.default_rng(seed)
    return tables.PROMPTS.build(
        {
            "id": f"p{i:03d}",
            "prompt": f"question {i}",
            "text": f"question {i}",
            "prompt_ids": draw.integers(3, 300, size=draw.integers(1, 50)).tolist(),
            "reference": None,
            "answer": str(i),
            "group": None,
        }
        for i in range(count)
    )


def samples(out: Path | str) -> list[dict[str, Any]]:
    return Shards(str(out), tables.SAMPLES, "prompt_id").read().to_pylist()


@dataclass(frozen=True)
class Mortal(SampleWork):
    """Sampling whose process dies, as if by kill -9, when it meets certain prompts."""

    poison: tuple[str, ...] = ()
    #: Folder of marks: with it, a prompt kills only once.
    once: str | None = None

    def answer(self, engine: Engine, rows: Any) -> Answers:
        for row in rows:
            if row["id"] in self.poison:
                mark = None if self.once is None else Path(self.once) / row["id"]
                if mark is None or not mark.exists():
                    if mark is not None:
                        mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
        return super().answer(engine, rows)

    def told(self) -> dict[str, Any]:
        return SampleWork.told(self)


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None, tiny_qwen: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """vLLM, one actor, one batch: what every other run must equal. Two samples of each of 40 prompts."""
    out = tmp_path_factory.mktemp("undisturbed")
    facts = sample(
        prompts(), str(tiny_qwen), engine("vllm", 128), SAMPLING, 2, str(out), seed=3, model_id="m"
    )
    rows = samples(out)
    assert facts["rows"] == PROMPTS
    assert facts["tokens_out"] == sum(len(row["response_ids"]) for row in rows)
    assert [(row["prompt_id"], row["index"]) for row in rows] == [
        (f"p{i:03d}", k) for i in range(PROMPTS) for k in (0, 1)
    ]
    assert len({row["id"] for row in rows}) == len(rows)
    return rows


def test_two_actors_small_batches_and_a_kill(
    undisturbed: list[dict[str, Any]], tiny_qwen: Path, tmp_path: Path
) -> None:
    """Batches of 7, two vLLM actors, one of them killed with SIGKILL on the way: the same rows."""
    (tmp_path / "marks").mkdir()
    work = Mortal(SAMPLING, 2, 3, poison=("p011",), once=str(tmp_path / "marks"))
    job = Job(prompts(), str(tiny_qwen), work, str(tmp_path / "out"), "m")
    facts = run([job], engine("vllm", 7, actors=2))[0]
    assert (tmp_path / "marks" / "p011").exists(), "nothing was killed"
    assert samples(tmp_path / "out") == undisturbed
    assert (facts["rejected"], facts["killed"]) == (0, 0)


def test_batches_of_one_sample(undisturbed: list[dict[str, Any]], tiny_qwen: Path, tmp_path: Path) -> None:
    """Batches of 1 at one vLLM actor; those of 64 follow below."""
    facts = sample(
        prompts(),
        str(tiny_qwen),
        engine("vllm", 1),
        SAMPLING,
        2,
        str(tmp_path),
        seed=3,
        model_id="m",
    )
    assert len(list(tmp_path.glob("*.parquet"))) == PROMPTS, "one shard a prompt"
    assert samples(tmp_path) == undisturbed
    assert facts["actors"] == 1


DRIVER = """
    import os, signal, sys
    import ray
    sys.path.insert(0, {root!r})
    from tests.data.test_inference import SAMPLING, engine, prompts
    from allo_ray.data.inference import sample

    class DieAfterFirst:
        def update(self, done, total, unit, **facts):
            os.kill(os.getpid(), signal.SIGKILL)

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    config = engine("vllm", 2, batches_in_flight=1)
    sample(prompts(), {model!r}, config, SAMPLING, 2, {out!r}, seed=3, model_id="m", progress=DieAfterFirst())
"""


def test_killed_driver_resumes(undisturbed: list[dict[str, Any]], tiny_qwen: Path, tmp_path: Path) -> None:
    """SIGKILL of the driver after its first batch of one prompt; a second run with other batches does the rest."""
    out, root = str(tmp_path / "out"), str(Path(__file__).parents[2])
    script = textwrap.dedent(DRIVER.format(root=root, model=str(tiny_qwen), out=out))
    killed = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    there = len(samples(out))
    assert 2 <= there < len(undisturbed)
    facts = sample(prompts(), str(tiny_qwen), engine("vllm", 64), SAMPLING, 2, out, seed=3, model_id="m")
    assert facts["skipped"] * 2 >= there, "what was there is not done again"
    assert samples(out) == undisturbed


def test_a_poison_row_is_given_up_and_the_rest_goes_on(
    ray_cluster: None, tiny_qwen: Path, tmp_path: Path
) -> None:
    """A row kills every engine that meets it, with another batch under way beside it: it alone is given up."""
    work = Mortal(SAMPLING, 1, 3, poison=("p002",))
    rows = prompts(12)
    facts = run([Job(rows, str(tiny_qwen), work, str(tmp_path / "out"), "m")], engine(batch=8))[0]
    shards = Shards(str(tmp_path / "out"), tables.SAMPLES, "prompt_id")
    assert facts["killed"] == facts["rejected"] == 1
    assert {row.id for row in shards.rejected()} == {"p002"}
    assert all(row.kind == "killed" and "died" in row.reason for row in shards.rejected())
    done = [row["prompt_id"] for row in samples(tmp_path / "out")]
    assert done == [f"p{i:03d}" for i in range(12) if i != 2]


@dataclass(frozen=True)
class Patient(SampleWork):
    """Its batches wait until a second process works on the job too (at most a minute)."""

    marks: str = ""

    def answer(self, engine: Engine, rows: Any) -> Answers:
        (Path(self.marks) / str(os.getpid())).touch()
        patience = time.monotonic() + 60
        while len(list(Path(self.marks).iterdir())) < 2 and time.monotonic() < patience:
            time.sleep(0.1)
        return super().answer(engine, rows)


def test_an_actor_joins_while_the_job_runs(ray_cluster: None, tiny_qwen: Path, tmp_path: Path) -> None:
    """A pool of one to two actors: batches queue up at the first, so a second is started and takes its share."""
    (tmp_path / "marks").mkdir()
    work = Patient(Sampling(temperature=0, max_tokens=2), 1, 0, marks=str(tmp_path / "marks"))
    job = Job(prompts(24), str(tiny_qwen), work, str(tmp_path / "out"))
    assert run([job], engine(batch=2, actors=(1, 2)))[0]["actors"] == 2
    assert len(samples(tmp_path / "out")) == 24


def test_one_job_and_the_same_again(ray_cluster: None, tiny_qwen: Path, tmp_path: Path) -> None:
    """Verdicts are written, rows that cannot be answered are listed, and a second run does nothing."""
    rows = prompts(4).to_pylist()
    rows[0]["prompt_ids"], rows[2]["prompt_ids"] = [], [5] * 256
    greedy, verify = Sampling(temperature=0, max_tokens=4), VerifyConfig(kind="exact", fallback="whole")

    def job() -> dict[str, Any]:
        return sample(
            tables.PROMPTS.build(rows), str(tiny_qwen), engine(), greedy, 1, str(tmp_path), verify=verify
        )

    first = job()
    told = {row.id: row.reason for row in Shards(str(tmp_path), tables.SAMPLES, "prompt_id").rejected()}
    assert (first["rows"], first["skipped"], first["rejected"]) == (4, 0, 2)
    assert "no tokens" in told["p000"]
    assert "256 tokens" in told["p002"]
    assert [(row["prompt_id"], row["verdict"]) for row in samples(tmp_path)] == [
        ("p001", False),
        ("p003", False),
    ]
    assert len(list(tmp_path.glob("index/*.npz"))) == 1, "the second run need not open the shards"
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.parquet")}
    again = job()
    assert (again["rows"], again["skipped"], again["tokens_out"], again["startup_seconds"] < 5) == (
        4,
        4,
        0,
        True,
    )
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.parquet")} == files
    assert json.loads((tmp_path / "summary.json").read_text())["skipped"] == 4


def test_other_parameters_are_refused(ray_cluster: None, tiny_qwen: Path, tmp_path: Path) -> None:
    """The folder knows what it was made with from the moment its first run starts."""
    out, four = str(tmp_path), Sampling(temperature=0, max_tokens=4)
    sample(prompts(0), str(tiny_qwen), engine(), four, 1, out)
    with pytest.raises(UserError, match=r"work\.sampling\.max_tokens: 4 there, 5 asked for"):
        sample(prompts(2), str(tiny_qwen), engine(), Sampling(temperature=0, max_tokens=5), 1, out)
    with pytest.raises(UserError, match=r"model: .* there, \"another\" asked for"):
        sample(prompts(2), str(tiny_qwen), engine(), four, 1, out, model_id="another")


def test_a_model_without_weights_is_named(ray_cluster: None, tiny_qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    shutil.copy(tiny_qwen / "config.json", tmp_path / "model")
    with pytest.raises(
        UserError, match=r"model: the transformers engine does not start: .*model\.safetensors"
    ):
        sample(prompts(2), str(tmp_path / "model"), engine(), SAMPLING, 1, str(tmp_path / "out"))


def test_a_users_error_inside_an_actor_is_one_line(
    ray_cluster: None, tiny_qwen: Path, tmp_path: Path
) -> None:
    verify = VerifyConfig(kind="callable", function="operator:neg")
    greedy = Sampling(temperature=0, max_tokens=2)
    with pytest.raises(UserError, match=r"^verify\.function: operator:neg raised TypeError[^\n]*$"):
        sample(prompts(2), str(tiny_qwen), engine(), greedy, 1, str(tmp_path), verify=verify)


def test_ids_must_be_unique(ray_cluster: None, tiny_qwen: Path, tmp_path: Path) -> None:
    twice = pa.concat_tables([prompts(3), prompts(1)])
    with pytest.raises(UserError, match="'p000'"):
        sample(twice, str(tiny_qwen), engine(), SAMPLING, 1, str(tmp_path))


def test_models_of_one_architecture_share_the_actors(
    ray_cluster: None, tiny_qwen: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """Two models in one run: one actor serves both, and the second gives what it gives alone."""
    other = str(tiny_model("qwen", tmp_path / "other", seed=1))
    work = SampleWork(Sampling(temperature=1.0, top_p=1.0, max_tokens=8), 1, 0)
    models = {"first": str(tiny_qwen), "second": other}
    together = [
        Job(prompts(20), model, work, str(tmp_path / "both" / name)) for name, model in models.items()
    ]
    facts = run(together, engine(batch=4))
    alone = TransformersEngine(engine(), other)
    truth = work.answer(alone, prompts(20).to_pylist()).rows
    assert samples(tmp_path / "both" / "second") == tables.SAMPLES.build(truth).to_pylist()
    assert samples(tmp_path / "both" / "first") != samples(tmp_path / "both" / "second")
    assert [told["actors"] for told in facts] == [1, 1]
    mixed = [*together, Job(prompts(20), str(tiny_llama), work, str(tmp_path / "llama"))]
    with pytest.raises(UserError, match="architecture"):
        run(mixed, engine())


def test_scores_from_a_folder_of_parquet(ray_cluster: None, tiny_qwen: Path, tmp_path: Path) -> None:
    """One probability for each response token, whatever the files and batches."""
    draw = np.random.default_rng(4)
    rows = pa.table(
        {
            "id": [f"r{i}" for i in range(30)],
            "context_ids": [draw.integers(3, 300, size=9).tolist() for _ in range(30)],
            "response_ids": [draw.integers(3, 300, size=draw.integers(0, 20)).tolist() for _ in range(30)],
        }
    )
    (tmp_path / "rows").mkdir()
    for part in range(3):
        pq.write_table(rows.slice(part * 10, 10), tmp_path / "rows" / f"{part}.parquet")
    score(tmp_path / "rows", str(tiny_qwen), engine(batch=8), str(tmp_path / "out"))
    told = Shards(str(tmp_path / "out"), tables.TOKEN_SCORES, "id").read().to_pylist()
    lengths = dict(zip(rows["id"].to_pylist(), map(len, rows["response_ids"].to_pylist()), strict=True))
    assert {row["id"]: len(row["p_re"]) for row in told} == lengths
    assert all(0 < p <= 1 for row in told for p in row["p_re"])


class Fixed:
    """An engine that gives every token the log-prob -0.5."""

    def score(self, requests: Any) -> list[np.ndarray]:
        return [np.full(len(request.response_ids), -0.5, np.float32) for request in requests]


def test_probabilities_are_the_exponentials_of_log_probs() -> None:
    rows = [{"id": "a", "context_ids": [1, 2], "response_ids": [3, 4]}]
    told = ScoreWork(logprobs=True).answer(Fixed(), rows)  # type: ignore[arg-type]
    assert SCORES.build(told.rows).to_pylist() == [{"id": "a", "logprobs": [-0.5, -0.5]}]
    probabilities = ScoreWork().answer(Fixed(), rows).rows[0]["p_re"]  # type: ignore[arg-type]
    np.testing.assert_allclose(probabilities, np.exp(-0.5), rtol=1e-6)
    assert (told.tokens_in, told.tokens_out) == (4, 2)


@dataclass(frozen=True)
class Measure(SampleWork):
    """Asks the engine nothing; its rows are large."""

    columns = ("id", "text")

    def problem(self, row: Any, max_model_len: int) -> str | None:
        return None

    def answer(self, engine: Engine, rows: Any) -> Answers:
        told = {
            "index": 0,
            "seed": 0,
            "response_ids": [],
            "finish_reason": "stop",
            "answer": None,
            "verdict": None,
        }
        out = [{"id": row["id"], "prompt_id": row["id"], "text": row["text"][:40], **told} for row in rows]
        return Answers(out, 0, 0)


class Peak:
    """Largest private memory of this process while it is open, in bytes."""

    def __enter__(self) -> Peak:
        self.bytes = 0
        self._open = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()

    def _watch(self) -> None:
        while self._open:
            self.bytes = max(self.bytes, private_bytes())
            time.sleep(0.02)


def test_memory_does_not_grow_with_the_input(ray_cluster: None, tiny_qwen: Path, tmp_path: Path) -> None:
    """2,000 rows of 40 kB (80 MB) against 100: the driver's and the actor's peaks stay within 10 %."""

    def rows(count: int) -> Path:
        folder = tmp_path / f"rows{count}"
        folder.mkdir()
        draw = np.random.default_rng(0)
        for part in range(count // 100):
            texts = [draw.bytes(20_000).hex() for _ in range(100)]
            ids = [f"{part}-{i}" for i in range(100)]
            pq.write_table(pa.table({"id": ids, "text": texts}), folder / f"{part:03d}.parquet")
        return folder

    peaks, actors = [], []
    inputs = {count: rows(count) for count in (100, 2000)}
    for count, path in inputs.items():
        job = Job(path, str(tiny_qwen), Measure(SAMPLING, 1, 0), str(tmp_path / f"out{count}"))
        with Peak() as peak:
            facts = run([job], engine(batch=100))[0]
        assert facts["rows"] == count == len(samples(tmp_path / f"out{count}"))
        peaks.append(peak.bytes)
        actors.append(facts["peak_private_bytes"])
    assert peaks[1] < 1.1 * peaks[0]
    assert actors[1] < 1.1 * actors[0]
