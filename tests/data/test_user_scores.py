"""A user's rows to score: the same work once, every row of the source findable."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from allo_ray import records
from allo_ray.config.jobs import ScoreColumns
from allo_ray.data import user_scores
from allo_ray.data.reward_rows import SCORE_ROWS
from allo_ray.data.tokenise import Tokeniser
from allo_ray.data.user_scores import POLICY_ROWS, USER_ROWS, write_user_rows
from allo_ray.errors import UserError


def source(folder: Path, rows: list[dict]) -> str:
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "x.jsonl")


def test_equal_rows_are_scored_once(
    tmp_path: Path, tokeniser: Tokeniser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an id column, over the borders of batches; by text or by the same token ids."""
    monkeypatch.setattr(user_scores, "BATCH_ROWS", 2)
    given = [("a", "1"), ("a", "2"), ("b", "1"), ("a", "2"), ("a", "1")]
    rows: list[dict] = [{"context": context, "response": response} for context, response in given]
    rows.append({"context_ids": tokeniser.prompt("b"), "response_ids": tokeniser.plain("1")})
    told = write_user_rows(tmp_path / "out.parquet", source(tmp_path, rows), ScoreColumns(), tokeniser)
    assert told == {"rows": 6, "repeated": 3}
    work = {row["id"]: row for row in SCORE_ROWS.read(tmp_path / "out.parquet").to_pylist()}
    places = USER_ROWS.read(tmp_path / "rows.parquet").to_pylist()
    assert len(work) == 3
    assert [row["row"] for row in places] == [1, 2, 3, 4, 5, 6]
    for (context, response), place in zip([*given, ("b", "1")], places, strict=True):
        assert work[place["id"]]["context_ids"] == tokeniser.prompt(context)
        assert work[place["id"]]["response_ids"] == tokeniser.plain(response)


def test_an_id_names_one_content(
    tmp_path: Path, tokeniser: Tokeniser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id may come again with the same content, not with another one."""
    monkeypatch.setattr(user_scores, "BATCH_ROWS", 2)
    rows = [{"name": str(i), "context": "a", "response": str(i)} for i in range(5)]
    columns = ScoreColumns(id="name")
    out = tmp_path / "out.parquet"
    assert write_user_rows(out, source(tmp_path, [*rows, rows[1]]), columns, tokeniser)["repeated"] == 1
    clash = rows[1] | {"response": "other"}
    with pytest.raises(
        UserError, match=r"x.jsonl, line 6, field 'name': '1' is the id of .* line 2 \(1 such"
    ):
        write_user_rows(out, source(tmp_path, [*rows, clash]), columns, tokeniser)


@pytest.mark.parametrize("name", ["x.parquet", "x.jsonl"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, tokeniser: Tokeniser, name: str) -> None:
    (tmp_path / name).write_bytes(b"PAR1\xff\xfe and no more")
    with pytest.raises(UserError, match=rf"{name}.*: (cannot be read|is no UTF-8 text)"):
        write_user_rows(tmp_path / "out.parquet", str(tmp_path / name), ScoreColumns(), tokeniser)


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_give_what_one_process_gives(
    tmp_path: Path, tokeniser: Tokeniser, tiny_bytes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of two rows by Ray tasks: the same files; the policy's tokens are bytes, of each content once."""
    words = ["one", "two", "three", "café", "你", "two", "seven"]
    rows = source(tmp_path, [{"context": f"say {word}", "response": f" {word}!"} for word in words])
    monkeypatch.setattr(records, "PIECE_ROWS", 2)
    names = ("score_rows.parquet", "rows.parquet", user_scores.POLICY_FILE)
    for most in (16, 0):
        monkeypatch.setattr(user_scores, "PIECES_IN_PLACE", most)
        out = tmp_path / str(most) / names[0]
        told = write_user_rows(out, rows, ScoreColumns(), tokeniser, Tokeniser(str(tiny_bytes)))
        assert told == {"rows": 7, "repeated": 1}
    for name in names:
        assert pq.read_table(tmp_path / "16" / name).equals(pq.read_table(tmp_path / "0" / name))
    owned = POLICY_ROWS.read(tmp_path / "0" / names[2]).to_pylist()
    assert [len(row["response_ids"]) for row in owned] == [5, 5, 7, 7, 5, 7]
