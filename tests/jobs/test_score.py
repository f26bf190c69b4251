"""`allo score` as a user runs it, with a policy whose tokens are not the scoring model's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from allo_ray import tables
from allo_ray.config.jobs import ScoreJob
from allo_ray.config.load import load_as
from allo_ray.data.align_tokens import carry_over
from allo_ray.data.tokenise import Tokeniser
from allo_ray.errors import UserError
from allo_ray.store import local_path


def test_scores_are_carried_over_to_the_policys_tokens(
    tiny_bytes: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte of the response takes the probability of the scoring model's token that holds it.

    `out` is a URL whose folder was there before, with other scores: what was fetched then must not count now.
    """
    monkeypatch.setenv("ALLO_RAY_CACHE", str(tmp_path / "cache"))
    out = f"file://{tmp_path}/out"
    tables.TOKEN_SCORES.write([{"id": "0", "p_re": [0.5]}], tmp_path / "out" / "scores" / "old.parquet")
    local_path(f"{out}/scores")
    shutil.rmtree(tmp_path / "out")

    answers = [" The answer is 42", " The café 你", "17"]
    rows = tmp_path / "rows.jsonl"
    lines = [{"name": str(at), "context": "17 + 25 =", "response": text} for at, text in enumerate(answers)]
    lines.append(lines[0])  # the same row again is scored once
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = tmp_path / "score.yaml"
    told = {"out": out, "rows": str(rows), "columns": {"id": "name"}}
    told |= {"model": {"path": str(tiny_llama)}, "policy": {"path": str(tiny_bytes)}}
    told["engine"] = {"kind": "transformers", "dtype": "float32", "max_model_len": 256}
    config.write_text(yaml.safe_dump(told))
    command = [sys.executable, "-m", "jobs.score", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)  # and nothing else
    assert summary["input"] == {"rows": 4, "repeated": 1}
    assert summary["rows"] == 3
    assert summary["carried"] == {"rows": 3, "unscored": 0}
    assert len(pq.read_table(tmp_path / "out" / "rows.parquet")) == 4

    raw = {
        row["id"]: row["p_re"] for row in tables.TOKEN_SCORES.read(tmp_path / "out" / "scores").to_pylist()
    }
    found = tables.TOKEN_SCORES.read(tmp_path / "out" / "token_scores.parquet").to_pylist()
    ours, theirs = Tokeniser(str(tiny_bytes)), Tokeniser(str(tiny_llama))
    for row in found:
        text = answers[int(row["id"])]
        assert len(row["p_re"]) == len(text.encode())
        assert len(raw[row["id"]]) == len(theirs.plain(text)) <= len(row["p_re"])
        assert row["p_re"] == pytest.approx(
            carry_over(ours, theirs, ours.plain(text), raw[row["id"]]).tolist()
        )


def test_log_probs_are_not_carried_over(tmp_path: Path) -> None:
    config = tmp_path / "score.yaml"
    told = {"out": "out", "rows": "rows.jsonl", "model": {"path": "tiny:llama"}, "logprobs": True}
    config.write_text(yaml.safe_dump(told | {"policy": {"path": "tiny:qwen"}}))
    with pytest.raises(UserError, match="set logprobs: false"):
        load_as(ScoreJob, config)
