"""Rewrites of negatives: verified, counted, resumable; and what the reward model reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_ray import tables
from allo_ray.config.data import VerifyConfig
from allo_ray.data.reward_rows import (
    SCORE_ROWS,
    context_of,
    write_prompt_sequences,
    write_reward_sequences,
    write_score_rows,
    write_token_scores,
)
from allo_ray.data.rewrite import edit_distance, rewrite_pairs
from allo_ray.data.teachers import ArithmeticTeacher, Case
from allo_ray.data.tokenise import Tokeniser
from allo_ray.errors import UserError

VERIFY = VerifyConfig(kind="numeric")


class Scripted:
    """A teacher that answers by prompt, and can break down after some answers."""

    name = "scripted"

    def __init__(self, answers: dict[str, str | None], after: int | None = None) -> None:
        self.answers, self.after, self.asked = answers, after, []

    def rewrite(self, cases: Iterable[Case]) -> Iterator[tuple[str, str | None]]:
        for count, case in enumerate(cases):
            if count == self.after:
                raise RuntimeError("killed")
            self.asked.append(case)
            yield case.id, self.answers.get(case.prediction.split("=")[0].strip(), None)


@pytest.fixture
def pairs(tmp_path: Path, make_pair: Callable[..., Any]) -> Path:
    """Five negatives; the last stands in two pairs."""
    rows = [make_pair(number) for number in (*range(5), 4)]
    rows[5]["id"] = f"{5:016x}"
    tables.PAIRS.write(rows, tmp_path / "pairs.parquet")
    return tmp_path / "pairs.parquet"


def run(pairs: Path, teacher: Any, tokeniser: Tokeniser, **changes: Any) -> tuple[dict, list[dict]]:
    out = pairs.with_name("rewrites.parquet")
    facts = rewrite_pairs(out, pairs=pairs, teacher=teacher, verify=VERIFY, reward=tokeniser, **changes)
    return facts, tables.REWRITES.read(out).to_pylist()


def test_the_arithmetic_teacher_corrects_all(pairs: Path, tokeniser: Tokeniser) -> None:
    facts, rows = run(pairs, ArithmeticTeacher("The answer is"), tokeniser)
    assert facts == {
        "pairs": 6,
        "negatives": 5,
        "rewritten": 5,
        "no_rewrite": 0,
        "wrong": 0,
        "unchanged": 0,
        "rows": 6,
    }
    row = rows[2]
    assert row["prediction"] == " 2 + 1 = 12. The answer is 12"
    assert row["rewrite"] == " 2 + 1 = 3. The answer is 3"
    assert row["rewrite_ids"] == tokeniser.response(row["rewrite"])
    assert row["context_ids"] == tokeniser.prompt(row["context"])
    assert "### Problem:\n2 + 1\n" in row["context"]
    assert "### Correct solution:\n2 + 1 = 3. The answer is 3\n" in row["context"]
    assert row["edits"] == 4  # 1, 2 -> 3, twice: one digit replaced, one deleted
    assert row["teacher"] == "arithmetic"


def test_wrong_unchanged_and_missing_rewrites_are_counted_not_kept(pairs: Path, tokeniser: Tokeniser) -> None:
    told = {
        "0 + 1": "0 + 1 = 1. The answer is 1",
        "1 + 1": "1 + 1 = 3. The answer is 3",
        "2 + 1": " 2 + 1 = 12. The answer is 12 ",
        "3 + 1": "",
    }
    facts, rows = run(pairs, Scripted(told), tokeniser)
    assert {name: facts[name] for name in ("rewritten", "wrong", "unchanged", "no_rewrite", "rows")} == {
        "rewritten": 1,
        "wrong": 1,
        "unchanged": 1,
        "no_rewrite": 2,
        "rows": 1,
    }
    assert rows[0]["rewrite"] == " 0 + 1 = 1. The answer is 1"  # with the prediction's own blank in front


def test_a_killed_run_asks_only_for_what_is_missing(pairs: Path, tokeniser: Tokeniser) -> None:
    told = {f"{i} + 1": f"{i} + 1 = {i + 1}. The answer is {i + 1}" for i in range(5)}
    first = Scripted(told, after=3)
    with pytest.raises(RuntimeError, match="killed"):
        run(pairs, first, tokeniser)
    journal = pairs.with_name("rewrites.parquet.journal.jsonl")
    with journal.open("a") as file:
        file.write('{"id": "cut sho')  # the last line of a process that died while it wrote
    second = Scripted(told)
    facts, rows = run(pairs, second, tokeniser)
    assert [len(first.asked), len(second.asked)] == [3, 2]
    assert facts["rows"] == 6
    assert not journal.exists()
    whole = pairs.parent / "again"
    whole.mkdir()
    facts_again = rewrite_pairs(
        whole / "rewrites.parquet", pairs=pairs, teacher=Scripted(told), verify=VERIFY, reward=tokeniser
    )
    assert facts_again == facts
    assert tables.REWRITES.read(whole / "rewrites.parquet").to_pylist() == rows


def test_human_negatives_are_rewritten_only_where_there_are_no_others(
    tmp_path: Path, make_pair: Callable[..., Any], tokeniser: Tokeniser
) -> None:
    """Algorithm 1 rewrites what was sampled; data that brings its own pairs has nothing else to rewrite."""
    rows = [make_pair(0), make_pair(1, rejected_source="human")]
    path = tmp_path / "pairs.parquet"
    tables.PAIRS.write(rows, path)
    assert run(path, ArithmeticTeacher("The answer is"), tokeniser)[0]["pairs"] == 1
    tables.PAIRS.write(rows[1:], path)
    assert run(path, ArithmeticTeacher("The answer is"), tokeniser)[0]["pairs"] == 1


def test_not_one_right_rewrite_is_the_users_error(pairs: Path, tokeniser: Tokeniser) -> None:
    with pytest.raises(UserError, match="corrected none of 5 negatives"):
        run(pairs, Scripted({}), tokeniser)


def test_without_reference_the_chosen_response_is_the_solution(make_pair: Callable[..., Any]) -> None:
    pair = make_pair(3, reference=None)
    assert f"### Correct solution:\n{pair['chosen'].strip()}\n" in context_of(pair)


def slow_distance(left: list[int], right: list[int]) -> int:
    """The textbook recursion, row by row."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        new = [i]
        for j, b in enumerate(right, start=1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (a != b)))
        row = new
    return row[-1]


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_edit_distance(left: list[int], right: list[int]) -> None:
    assert edit_distance(left, right) == slow_distance(left, right)


def test_reward_sequences_count_equal_ones_once(pairs: Path, tokeniser: Tokeniser) -> None:
    run(pairs, ArithmeticTeacher("The answer is"), tokeniser)
    rewrites, out = pairs.with_name("rewrites.parquet"), pairs.with_name("sequences.parquet")
    told = {"rewrites": rewrites, "max_tokens": 10_000}
    assert write_reward_sequences(out, **told) == {"rows": 5, "repeated": 1, "over_long": 0, "over_limit": 0}
    row = tables.SEQUENCES.read(out).to_pylist()[0]
    first = tables.REWRITES.read(rewrites).to_pylist()[0]
    assert (row["prompt_ids"], row["response_ids"]) == (first["context_ids"], first["rewrite_ids"])
    assert write_reward_sequences(out, **told, limit=2)["over_limit"] == 3
    assert write_reward_sequences(out, rewrites=rewrites, max_tokens=20)["rows"] == 0


def test_prompt_sequences(tmp_path: Path, tokeniser: Tokeniser) -> None:
    rows = [
        {
            "id": f"{i}",
            "prompt": "p",
            "text": "p",
            "prompt_ids": [5],
            "reference": ref,
            "answer": None,
            "group": None,
        }
        for i, ref in enumerate(["yes", None, "yes " * 30])
    ]
    tables.PROMPTS.write(rows, tmp_path / "p.parquet")
    facts = write_prompt_sequences(
        tmp_path / "s.parquet", prompts=tmp_path / "p.parquet", tokeniser=tokeniser, max_tokens=20
    )
    assert facts == {"rows": 1, "without_reference": 1, "over_long": 1}
    [row] = tables.SEQUENCES.read(tmp_path / "s.parquet").to_pylist()
    assert row["response_ids"] == tokeniser.response("yes")


def test_scores_pass_through_where_the_tokenizer_is_the_same(pairs: Path, tokeniser: Tokeniser) -> None:
    rows = pairs.with_name("score_rows.parquet")
    facts = write_score_rows(rows, pairs=pairs, policy=tokeniser, reward=tokeniser)
    assert facts == {"rows": 6, "other_tokenizer": 0}
    asked = SCORE_ROWS.read(rows).to_pylist()
    raw = [{"id": row["id"], "p_re": np.linspace(0.1, 0.9, len(row["response_ids"]))} for row in asked[:-1]]
    tables.TOKEN_SCORES.write(raw, pairs.with_name("raw.parquet"))
    out = pairs.with_name("scores.parquet")
    told = write_token_scores(
        out, pairs=pairs, raw=pairs.with_name("raw.parquet"), policy=tokeniser, reward=tokeniser
    )
    assert told == {"rows": 5, "unscored": 1}
    assert tables.TOKEN_SCORES.read(out).column("p_re").to_pylist()[0] == pytest.approx(
        raw[0]["p_re"].tolist()
    )


def test_scores_of_another_tokenizer_come_back_on_the_policys_tokens(
    pairs: Path, tokeniser: Tokeniser, tiny_qwen: Path
) -> None:
    other = Tokeniser(str(tiny_qwen))
    rows = pairs.with_name("score_rows.parquet")
    assert write_score_rows(rows, pairs=pairs, policy=tokeniser, reward=other)["other_tokenizer"] == 1
    asked = SCORE_ROWS.read(rows).to_pylist()
    raw = [{"id": row["id"], "p_re": np.full(len(row["response_ids"]), 0.25)} for row in asked]
    tables.TOKEN_SCORES.write(raw, pairs.with_name("raw.parquet"))
    out = pairs.with_name("scores.parquet")
    write_token_scores(out, pairs=pairs, raw=pairs.with_name("raw.parquet"), policy=tokeniser, reward=other)
    scores = {row["id"]: row["p_re"] for row in tables.TOKEN_SCORES.read(out).to_pylist()}
    for pair in tables.PAIRS.read(pairs).to_pylist():
        assert scores[pair["id"]] == [0.25] * len(pair["rejected_ids"])
