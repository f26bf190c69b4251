"""The paper's sets, from rows in their official formats."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from allo_ray.config.data import VerifyConfig
from allo_ray.data.verify import Verifier
from allo_ray.errors import UserError
from evals.suites.mathematics import boxed
from evals.suites.registry import build_suite

CHOICES = [{"text": "sun", "label": "A"}, {"text": "moon", "label": "B"}]


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def only(name: str, path: str, split: str = "test") -> Any:
    """The one row of a suite, its reference checked with the suite's own verifier."""
    suite = build_suite(name, path)
    [row] = suite.rows(split)
    if suite.verifier != "judge":
        verifier = Verifier(VerifyConfig(kind=suite.verifier))  # type: ignore[arg-type]
        assert verifier.check(row["prompt"], row["reference"] or "", row["answer"])[1] is True
        assert verifier.check(row["prompt"], "The answer is 12345", row["answer"])[1] is False
    return row


def test_ecqa(tmp_path: Path) -> None:
    """cqa_data_test.csv: the prompt is that of the paper's Table 7."""
    options = ["train station", "opera", "car rental shop", "show", "race track"]
    row = {"q_no": "1", "q_concept": "car", "q_text": "Where might he be going?", "q_ans": "train station"}
    row |= {f"q_op{i}": text for i, text in enumerate(options, start=1)}
    row |= {"taskA_pos": "pos", "taskA_neg": "neg", "taskB": "He got into his car,\nto the station."}
    with (tmp_path / "cqa_data_test.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    found = only("ecqa", str(tmp_path / "cqa_data_test.csv"))
    assert found["prompt"] == "Where might he be going?\nOptions:\n" + "\n".join(options)
    assert found["answer"] == "(A) train station"
    assert found["reference"].endswith("\nThe answer is train station")


@pytest.mark.parametrize("hub", [False, True])
def test_qasc_and_openbookqa(tmp_path: Path, hub: bool) -> None:
    """The authors' JSON lines, and the hub's rows with columns of choices."""
    asked: dict[str, Any] = {"question": {"stem": "What shines by day?", "choices": CHOICES}}
    facts = {"fact1": "the sun shines", "fact2": "day is when it shines."}
    if hub:
        columns = {"text": ["sun", "moon"], "label": ["A", "B"]}
        asked = {"question": "What shines by day?", "choices": columns}
    path = lines(tmp_path / "dev.jsonl", {"id": "1", "answerKey": "A", **asked, **facts})
    found = only("qasc", path, "dev")
    assert found["prompt"] == "What shines by day?\nOptions:\nsun\nmoon"
    assert found["answer"] == "(A) sun"
    assert found["reference"] == "the sun shines. day is when it shines.\nThe answer is sun"
    if hub:
        asked = {"question_stem": asked["question"], "choices": asked["choices"]}
    path = lines(tmp_path / "test.jsonl", {"id": "1", "answerKey": "B", **asked})
    found = only("openbookqa", path)
    assert (found["answer"], found["reference"]) == ("(B) moon", "The answer is moon")


def test_strategyqa(tmp_path: Path) -> None:
    row = {"qid": "1", "term": "t", "question": "Is it?", "answer": True, "facts": ["It is.", "Really."]}
    path = tmp_path / "strategyqa_train.json"
    path.write_text(json.dumps([row]))
    found = only("strategyqa", str(path), "train")
    assert found == {"prompt": "Is it?", "reference": "It is. Really.\nThe answer is yes", "answer": "yes"}
    path.write_text(json.dumps([row | {"answer": "yes"}]))
    with pytest.raises(UserError, match="expected true or false"):
        only("strategyqa", str(path), "train")


def test_gsm8k(tmp_path: Path) -> None:
    row = {"question": "How many clips?", "answer": "She sold 48/2 = <<48/2=24>>24 clips.\n#### 1,024"}
    found = only("gsm8k", lines(tmp_path / "test.jsonl", row))
    assert found["reference"] == "She sold 48/2 = 24 clips.\nThe answer is 1,024"
    assert found["answer"] == "1,024"
    with pytest.raises(UserError, match=r"line 1, field 'answer': has no '####"):
        only("gsm8k", lines(tmp_path / "test.jsonl", {"question": "q", "answer": "24"}))


def test_math(tmp_path: Path) -> None:
    """The authors' layout: a folder a subject, a JSON a problem, under train/ and test/."""
    pytest.importorskip("math_verify")
    folder = tmp_path / "test" / "algebra"
    folder.mkdir(parents=True)
    row = {
        "problem": "Half?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": "So $\\boxed{\\frac{1}{2}}$.",
    }
    (folder / "1.json").write_text(json.dumps(row))
    found = only("math", str(tmp_path / "test"))
    assert found["answer"] == "\\frac{1}{2}"
    (folder / "1.json").write_text(json.dumps(row | {"solution": "none"}))
    with pytest.raises(UserError, match="boxed"):
        only("math", str(tmp_path / "test"))


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("\\boxed{1}, no \\boxed{\\text{a {b}}}", "\\text{a {b}}"),
        ("\\fbox{3}", "3"),
        ("$\\boxed 5$", "5"),
        ("\\boxed{unclosed", None),
        ("none", None),
    ],
)
def test_boxed(solution: str, answer: str | None) -> None:
    assert boxed(solution) == answer


def test_mawps(tmp_path: Path) -> None:
    """The authors' JSON array, rows with N_00 places (as in the paper's followers), and the hub's rows."""
    path = tmp_path / "mawps.json"
    row = {"iIndex": 1, "sQuestion": " Joan has 3. ", "lEquations": ["X=1+2"], "lSolutions": [3.0]}
    path.write_text(json.dumps([row]))
    assert only("mawps", str(path)) == {
        "prompt": "Joan has 3.",
        "reference": "X=1+2. The answer is 3",
        "answer": "3",
    }
    places = {
        "Question": "Joan has N_00 and N_01 .",
        "Numbers": "1.0 2.5",
        "Equation": "+ N_00 N_01",
        "Answer": 3.5,
    }
    assert only("mawps", lines(tmp_path / "a.jsonl", places))["prompt"] == "Joan has 1 and 2.5 ."
    assert only("mawps", lines(tmp_path / "b.jsonl", {"question": "q", "result": "7"}))["answer"] == "7"


def test_tabmwp(tmp_path: Path) -> None:
    """problems_test.json: an object of problems by id; with and without choices."""
    row = {
        "question": "Which is cheaper?",
        "choices": ["pen", "book"],
        "answer": "pen",
        "unit": None,
        "table_title": "Prices",
        "table": "pen | $1\nbook | $2",
        "solution": "1 < 2.",
        "split": "test",
    }
    path = tmp_path / "problems_test.json"
    path.write_text(json.dumps({"17": row}))
    found = only("tabmwp", str(path))
    assert found["prompt"] == "Table: Prices\npen | $1\nbook | $2\nWhich is cheaper?\nOptions:\npen\nbook"
    assert found["answer"] == "(A) pen"
    free = row | {"choices": None, "answer": "1,200", "unit": "$"}
    path.write_text(json.dumps({"17": free}))
    found = only("tabmwp", str(path))
    assert found["prompt"].endswith("Which is cheaper? (Unit: $)")
    verifier = Verifier(VerifyConfig(kind="choice"))
    assert verifier.check("", "The answer is 1200.00", found["answer"])[1]


def test_alpaca_eval_and_arena_hard(tmp_path: Path) -> None:
    path = tmp_path / "alpaca_eval.json"
    path.write_text(
        json.dumps([{"dataset": "helpful_base", "instruction": "Say hi", "output": "hi", "generator": "g"}])
    )
    assert only("alpaca_eval", str(path)) == {"prompt": "Say hi", "reference": "hi", "answer": None}
    row = {"question_id": "1", "category": "hard", "cluster": "c", "turns": [{"content": "Write a compiler"}]}
    assert only("arena_hard", lines(tmp_path / "question.jsonl", row))["prompt"] == "Write a compiler"
    newer = {"uid": "1", "category": "hard", "prompt": "Write a compiler"}
    assert only("arena_hard", lines(tmp_path / "question.jsonl", newer))["prompt"] == "Write a compiler"


def test_a_folder_with_a_file_a_split(tmp_path: Path) -> None:
    for name, count in (("train.jsonl", 3), ("test.jsonl", 2)):
        lines(tmp_path / name, *[{"question": f"{name} {i}", "answer": "#### 1"} for i in range(count)])
    lines(tmp_path / "contest.jsonl", {"question": "in a contest", "answer": "#### 1"})  # names no split
    suite = build_suite("gsm8k", str(tmp_path))
    assert [len(list(suite.rows(split))) for split in ("train", "test")] == [4, 3]


def test_a_file_of_another_set_is_the_users_error(tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", {"text": "a"})
    for name in ("qasc", "gsm8k", "mawps", "alpaca_eval"):
        with pytest.raises(UserError, match=r"x\.jsonl, line 1: a row of .* needs the field .*found text"):
            only(name, path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no rows"):
        only("gsm8k", str(tmp_path / "empty.jsonl"))
