"""The estimate of KL(SFT || model) and the choice of samples, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from allo_ray import tables
from allo_ray.stages.divergence import divergence, rows_to_score


def test_the_mean_of_log_ratios_with_its_standard_error() -> None:
    """Ratios 1, 3, 5, 7 of four prompts: mean 4, variance (9 + 1 + 1 + 9) / 3 = 20/3, error sqrt(20/3 / 4)."""
    start = {"a": -1.0, "b": -1.0, "c": -1.0, "d": -1.0}
    model = {"a": -2.0, "b": -4.0, "c": -6.0, "d": -8.0}
    told = divergence(start, model, {name: name for name in start})
    assert told == {"mean": 4.0, "standard_error": pytest.approx(math.sqrt(5 / 3)), "n": 4}


def test_samples_of_one_prompt_count_once_in_the_error() -> None:
    """Each sample twice under the same prompt: the same mean, and no smaller error than without the copies."""
    start = dict.fromkeys("abcdefgh", 0.0)
    model = dict(zip("abcdefgh", [-1.0, -3.0, -5.0, -7.0] * 2, strict=True))
    told = divergence(start, model, dict(zip("abcdefgh", "1234" * 2, strict=True)))
    assert told == {"mean": 4.0, "standard_error": pytest.approx(math.sqrt(5 / 3)), "n": 8}


def test_only_samples_that_both_models_scored_count() -> None:
    told = divergence({"a": -1.0, "b": -1.0}, {"b": -3.0}, {"a": "1", "b": "2"})
    assert told == {"mean": 2.0, "standard_error": None, "n": 1}
    assert divergence({}, {}, {}) == {"mean": None, "standard_error": None, "n": 0}


def test_every_prompt_comes_before_second_samples(tmp_path: Path) -> None:
    """Three prompts with two samples each, in two shards of which one was written twice."""
    prompts = [
        {
            "id": f"p{i}",
            "prompt": "",
            "text": "",
            "prompt_ids": [i],
            "reference": None,
            "answer": None,
            "group": None,
        }
        for i in range(3)
    ]
    tables.PROMPTS.write(prompts, tmp_path / "prompts.parquet")
    rest = {"seed": 0, "text": "", "finish_reason": "stop", "answer": None, "verdict": None}
    samples = [
        {"id": f"s{i}{k}", "prompt_id": f"p{i}", "index": k, "response_ids": [i, k], **rest}
        for i in range(3)
        for k in range(2)
    ]
    tables.SAMPLES.write(samples[:4], tmp_path / "samples" / "one.parquet")
    tables.SAMPLES.write(samples[2:], tmp_path / "samples" / "two.parquet")
    rows = rows_to_score(tmp_path / "prompts.parquet", tmp_path / "samples", 4).to_pylist()
    assert [(row["id"], row["prompt_id"], row["context_ids"], row["response_ids"]) for row in rows] == [
        ("s00", "p0", [0], [0, 0]),
        ("s10", "p1", [1], [1, 0]),
        ("s20", "p2", [2], [2, 0]),
        ("s01", "p0", [0], [0, 1]),
    ]
    assert len(rows_to_score(tmp_path / "prompts.parquet", tmp_path / "samples", 100)) == 6
