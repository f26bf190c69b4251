"""Batch jobs: what they tell, what they refuse, what they share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from allo_ray import tables
from allo_ray.config.data import VerifyConfig
from allo_ray.data.inference import Job, run, sample, score
from allo_ray.data.inference_work import SCORES, SampleWork, ScoreWork
from allo_ray.data.shards import Shards
from allo_ray.engines.base import Sampling
from allo_ray.engines.transformers_engine import TransformersEngine
from allo_ray.errors import UserError
from allo_ray.models import tiny_model
from tests.data.inference_jobs import SAMPLING, engine, prompts, samples


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
    with pytest.raises(UserError, match=r'engine\.kind: "transformers" there, "vllm" asked for'):
        sample(prompts(2), str(tiny_qwen), engine("vllm"), four, 1, out)
    longer = engine().model_copy(update={"max_model_len": 300})
    with pytest.raises(UserError, match=r"engine\.max_model_len: 256 there, 300 asked for"):
        sample(prompts(2), str(tiny_qwen), longer, four, 1, out)


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


def test_rows_that_cannot_be_scored() -> None:
    """Context and response fill the 256 positions at most; the first token needs one before it."""
    work = ScoreWork()

    def problem(context: int, response: int) -> str | None:
        return work.problem({"id": "a", "context_ids": [5] * context, "response_ids": [6] * response}, 256)

    assert (problem(1, 255), problem(200, 56), problem(256, 0)) == (None, None, None)
    assert problem(200, 57) == "context and response have 257 tokens; the model reads 256"
    assert "context has no tokens" in str(problem(0, 4))
