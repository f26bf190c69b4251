"""`allo sample` and `allo score` on input that cannot work: one line that says what and where, exit code 2, and
nothing started. What a rule removes is counted, and a folder made with other settings is left alone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from allo_ray import tables
from jobs.cli import guarded

QUESTION = {"prompt": "1 + 1", "reference": "The answer is 2"}
GIVEN = {"context": "1 + 1 =", "response": " 2"}
ENGINE = {"kind": "transformers", "dtype": "float32", "max_model_len": 64}
EXACT = {"kind": "exact", "fallback": "whole"}

Refused = Callable[..., str]


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def config_file(path: Path, model: Path, told: dict[str, Any]) -> str:
    whole = {"model": {"path": str(model)}, "engine": ENGINE, "cluster": {"num_cpus": 4}} | told
    path.write_text(yaml.safe_dump(whole))
    return str(path)


@pytest.fixture
def refused(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused(job, settings): the message of a job that must not begin."""

    def run(job: str, told: dict[str, Any]) -> str:
        out = tmp_path / "out"
        config = config_file(tmp_path / "job.yaml", tiny_llama, {"out": str(out)} | told)
        assert guarded(f"jobs.{job}", ["--config", config]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        message = said.err[said.err.index("error: ") :]
        assert "Traceback" not in said.err
        assert message.count("\n") <= 2, "one line, or one for each wrong key"
        assert not (out / "run.log").exists(), "the log opens before Ray starts"
        return message

    return run


@pytest.mark.parametrize(
    ("rows", "told", "message"),
    [
        ([QUESTION, '{"prompt": '], {}, "x.jsonl, line 2: broken JSON"),
        (
            [QUESTION, {"question": "a"}],
            {},
            "x.jsonl, line 2, field 'prompt': is no column here.*data.columns",
        ),
        ([QUESTION, {"prompt": " "}], {}, "x.jsonl, line 2, field 'prompt': is empty; fill it or remove"),
        ([QUESTION, {"prompt": "a"}], {"verify": EXACT}, "line 2, field 'reference': is missing or empty"),
        (
            [QUESTION, {"prompt": "a " * 600}],
            {},
            "1 of 2 rows were dropped.*row 2, field 'prompt': .* tokens",
        ),
        ([QUESTION, {"prompt": "<bos><eos>"}], {}, "1 of 2 rows were dropped.*only special tokens"),
        ([], {}, "holds no rows"),
        ([QUESTION], {"data": {"template": "foo"}}, "template must be plain, chat, paper, or a text"),
        ([QUESTION], {"verify": {"kind": "callable", "function": "nosuch:f"}}, "nosuch:f cannot be imported"),
        ([QUESTION], {"model": {"path": "/nowhere/model"}}, "model.path /nowhere/model: no config.json"),
        ([QUESTION], {"engine": ENGINE | {"pool": {"actors": 4000}}}, "model.path: the weights.*4000 engine"),
    ],
)
def test_sampling_is_refused(
    rows: list[Any], told: dict[str, Any], message: str, refused: Refused, tmp_path: Path
) -> None:
    data = {"path": lines(tmp_path / "x.jsonl", rows)} | told.get("data", {})
    said = refused("sample", told | {"data": data})
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("rows", "told", "message"),
    [
        ([GIVEN, "{"], {}, "x.jsonl, line 2: broken JSON"),
        ([GIVEN, {"context": "a"}], {}, "line 2, field 'response': is missing or empty .*under columns"),
        ([GIVEN, {"context": "", "response": "a"}], {}, "line 2, field 'context': is empty"),
        (
            [GIVEN, {"context": ["a"], "response": "a"}],
            {},
            "line 2, field 'context': holds list; expected text",
        ),
        ([{"context": "a", "response_ids": ["x"]}], {}, "field 'response_ids': expected a list of token ids"),
        ([{"context": "a", "response_ids": [384]}], {}, "token ids from 0 to 383"),
        ([], {}, "holds no rows"),
        (
            [GIVEN | {"name": "a"}, GIVEN, GIVEN | {"name": "a", "response": "3"}],
            {"columns": {"id": "name"}},
            "line 2, field 'name': is missing or empty",
        ),
        (
            [GIVEN | {"name": "a"}, GIVEN | {"name": "b"}, GIVEN | {"name": "a", "response": "3"}],
            {"columns": {"id": "name"}},
            "line 3, field 'name': 'a' is the id of another context or response in .*x.jsonl, line 1",
        ),
        ([GIVEN], {"engine": ENGINE | {"pool": {"actors": 4000}}}, "model.path: the weights.*4000 engine"),
    ],
)
def test_scoring_is_refused(
    rows: list[Any], told: dict[str, Any], message: str, refused: Refused, tmp_path: Path
) -> None:
    said = refused("score", told | {"rows": lines(tmp_path / "x.jsonl", rows)})
    assert re.search(message, said), said


@pytest.mark.parametrize("job", ["sample", "score"])
def test_what_is_not_there_is_named(job: str, refused: Refused, tiny_llama: Path, tmp_path: Path) -> None:
    """No data, a model folder without weights, a file where the results should go."""
    missing, there = str(tmp_path / "none.jsonl"), lines(tmp_path / "x.jsonl", [QUESTION | GIVEN])

    def data(path: str) -> dict[str, Any]:
        return {"data": {"path": path}} if job == "sample" else {"rows": path}

    assert "none.jsonl: no such file or folder" in refused(job, data(missing))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny_llama / "config.json", bare)
    assert f"{bare}: no weights there" in refused(job, data(there) | {"model": {"path": str(bare)}})
    assert "is no folder to write to" in refused(job, data(there) | {"out": there})


def test_rules_are_counted_and_other_settings_refused(
    refused: Refused, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One real run, to a URL, with an over-long prompt, one of special tokens, a repeated one and one too long for
    the engine; then its folder is asked for other things."""
    monkeypatch.setenv("ALLO_RAY_CACHE", str(tmp_path / "cache"))
    rows: list[Any] = [{"prompt": f"{i} + 1"} for i in range(57)]
    rows += [{"prompt": "long " * 600}, {"prompt": "<bos><eos>"}, rows[0], {"prompt": "ab " * 60}]
    data = {"path": lines(tmp_path / "x.jsonl", rows), "max_prompt_tokens": 200, "max_dropped": 0.1}
    told = {"out": f"file://{tmp_path}/out", "data": data, "sample": {"n": 1, "max_tokens": 2}}
    config = config_file(tmp_path / "first.yaml", tiny_llama, told)
    done = subprocess.run(
        [sys.executable, "-m", "jobs.sample", "--config", config], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads(done.stdout)  # and nothing else
    assert summary["prompts"] == {"rows": 61, "kept": 58, "broke_a_rule": 2, "duplicates": 1}
    assert (summary["rows"], summary["rejected"]) == (58, 1)
    reasons = [row["reason"] for row in tables.DROPS.read(tmp_path / "out" / "drops.parquet").to_pylist()]
    assert [reason.split(" ")[0] for reason in reasons[1:]] == ["it", "the"]

    def files() -> dict[Path, int]:
        found = [path for folder in ("out", "cache") for path in (tmp_path / folder).rglob("*")]
        return {path: path.stat().st_mtime_ns for path in found if path.is_file()}

    before = files()
    assert {path.name for path in before} >= {"drops.parquet", "prompts.parquet", "summary.json", "run.log"}
    other = lines(tmp_path / "y.jsonl", rows[:50])
    for change, difference in (
        ({"sample": {"n": 3, "max_tokens": 2}}, "work.n: 1 there, 3 asked for"),
        ({"data": data | {"template": "Q: {prompt}"}}, 'source.template: "plain" there, "Q: {prompt}" asked'),
        ({"data": data | {"path": other}}, "source.content: "),
        ({"seed": 3}, "work.seed: 17 there, 3 asked for"),
    ):
        assert difference in refused("sample", told | change)
    assert files() == before


@pytest.mark.parametrize("job", ["sample", "score"])
def test_engines_that_no_node_has_room_for_are_told_at_once(
    job: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Not waited for without end: the cluster of this machine offers no `sampler`."""
    told: dict[str, Any] = {
        "out": str(tmp_path / "out"),
        "engine": ENGINE | {"pool": {"resources": {"sampler": 1}}},
    }
    rows = lines(tmp_path / "x.jsonl", [QUESTION | GIVEN])
    told |= {"data": {"path": rows}} if job == "sample" else {"rows": rows}
    config = config_file(tmp_path / "job.yaml", tiny_llama, told)
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{job}", "--config", config], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert re.search(r"error: the job needs .*sampler.*too little sampler", done.stderr), done.stderr[-2000:]
