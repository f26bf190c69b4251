"""Samples are judged after they were drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from allo_ray import tables
from allo_ray.config.data import VerifyConfig
from allo_ray.data import verdicts
from allo_ray.data.verdicts import write_verdicts
from allo_ray.errors import UserError


@pytest.mark.parametrize("in_place", [8, 0])
def test_verdicts_keep_order_and_count(
    in_place: int, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the driver, and by tasks of one sample each."""
    monkeypatch.setattr(verdicts, "BATCH_ROWS", 1)
    monkeypatch.setattr(verdicts, "ROWS_IN_PLACE", in_place)
    empty = dict.fromkeys(tables.PROMPTS.schema.names)
    prompts = [empty | {"id": "a", "prompt": "1 + 1", "answer": "2"}, empty | {"id": "b", "prompt": "?"}]
    tables.PROMPTS.write(prompts, tmp_path / "prompts.parquet")
    told = [("a", "The answer is 2.0"), ("a", "The answer is 3"), ("a", "two"), ("b", "The answer is 5")]
    samples = [
        {"id": f"{i}", "prompt_id": name, "index": i, "seed": 0, "text": text, "response_ids": [1]}
        | {"finish_reason": "stop", "answer": None, "verdict": None}
        for i, (name, text) in enumerate(told)
    ]
    tables.SAMPLES.write(samples[:2], tmp_path / "samples" / "0.parquet")
    tables.SAMPLES.write(samples[2:], tmp_path / "samples" / "1.parquet")
    facts = write_verdicts(
        tmp_path / "judged.parquet",
        prompts=tmp_path / "prompts.parquet",
        samples=tmp_path / "samples",
        verify=VerifyConfig(kind="numeric"),
    )
    assert facts == {"samples": 4, "right": 1, "wrong": 2, "unverified": 1, "no_answer": 1}
    rows = tables.SAMPLES.read(tmp_path / "judged.parquet").to_pylist()
    assert [(row["answer"], row["verdict"]) for row in rows] == [
        ("2.0", True),
        ("3", False),
        (None, False),
        ("5", None),
    ]


@pytest.mark.parametrize("in_place", [8, 0])
def test_a_function_that_fails_is_the_users(
    in_place: int, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the driver and in a task: one line that names function and response."""
    monkeypatch.setattr(verdicts, "ROWS_IN_PLACE", in_place)
    empty = dict.fromkeys(tables.PROMPTS.schema.names)
    tables.PROMPTS.write(
        [empty | {"id": "a", "prompt": "1 + 1", "answer": "2"}], tmp_path / "prompts.parquet"
    )
    row = {"id": "0", "prompt_id": "a", "index": 0, "seed": 0, "text": "two", "response_ids": [1]}
    row |= {"finish_reason": "stop", "answer": None, "verdict": None}
    tables.SAMPLES.write([row], tmp_path / "samples.parquet")
    with pytest.raises(
        UserError, match=r"^verify.function: operator:neg raised TypeError.* 'two' .*'1 \+ 1'"
    ):
        write_verdicts(
            tmp_path / "judged.parquet",
            prompts=tmp_path / "prompts.parquet",
            samples=tmp_path / "samples.parquet",
            verify=VerifyConfig(kind="callable", function="operator:neg"),
        )
