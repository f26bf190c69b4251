"""PROMPTS and PAIRS from the user's rows; rule-breakers dropped, counted and listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from allo_ray import records, tables
from allo_ray.config.data import DataConfig, VerifyConfig
from allo_ray.data import prepare
from allo_ray.data.prepare import prepare_pairs, prepare_prompts
from allo_ray.data.tokenise import Tokeniser
from allo_ray.errors import UserError


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs_of(tmp_path: Path, tokeniser: Tokeniser, rows: list[dict[str, Any]], **changes: Any):
    data = DataConfig(path=lines(tmp_path / "x.jsonl", rows), kind="pairs", **changes)
    facts = prepare_pairs(data, tokeniser, tmp_path / "pairs.parquet", tmp_path / "drops.parquet")
    return facts, tables.PAIRS.read(tmp_path / "pairs.parquet").to_pylist()


def test_prompts_are_rendered_and_tokenised(tmp_path: Path, tokeniser: Tokeniser) -> None:
    path = lines(tmp_path / "x.jsonl", [{"prompt": "1 + 1", "reference": " 1 + 1 = 2. The answer is 2"}])
    data = DataConfig(path=path, template="Question: {prompt}\nAnswer:")
    out = tmp_path / "prompts.parquet"
    facts = prepare_prompts(data, tokeniser, out, tmp_path / "drops.parquet", verify=VerifyConfig())
    assert facts["kept"] == 1
    [row] = tables.PROMPTS.read(out).to_pylist()
    assert row["text"] == "Question: 1 + 1\nAnswer:"
    assert row["prompt_ids"] == tokeniser.plain(row["text"])
    assert row["answer"] == "2"
    assert row["reference"] == " 1 + 1 = 2. The answer is 2"
    assert tables.DROPS.read(tmp_path / "drops.parquet").num_rows == 0


def test_pairs_end_in_eos(tmp_path: Path, tokeniser: Tokeniser) -> None:
    facts, [row] = pairs_of(tmp_path, tokeniser, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert facts["kept"] == 1
    assert row["chosen_ids"][-1] == row["rejected_ids"][-1] == tokeniser.eos
    assert (row["chosen_source"], row["rejected_source"]) == ("human", "human")


def test_over_long_repeated_and_special_rows_are_dropped_and_listed(
    tmp_path: Path, tokeniser: Tokeniser
) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(60)]
    rows[10] = {"prompt": "p", "chosen": "yes " * 40, "rejected": "no"}
    rows[20] = rows[19]
    rows[30] = {"prompt": "<bos>", "chosen": "yes", "rejected": "no"}
    rows[40] = {"prompt": "long " * 40, "chosen": "yes", "rejected": "no"}
    limits = {"max_tokens": 40, "max_prompt_tokens": 20, "max_dropped": 0.1}
    facts, kept = pairs_of(tmp_path, tokeniser, rows, **limits)
    assert facts == {"rows": 60, "kept": 56, "broke_a_rule": 3, "duplicates": 1}
    assert [row["prompt"] for row in kept] == [
        row["prompt"] for i, row in enumerate(rows) if i not in (10, 20, 30, 40)
    ]
    drops = {row["row"]: row for row in tables.DROPS.read(tmp_path / "drops.parquet").to_pylist()}
    assert {line: row["field"] for line, row in drops.items()} == {
        11: "chosen",
        21: "id",
        31: "prompt",
        41: "prompt",
    }
    assert "data.max_tokens is 40" in drops[11]["reason"]
    assert drops[11]["excerpt"].startswith("yes yes")
    assert drops[11]["source"].endswith("x.jsonl")


def test_too_many_drops_stop_the_run(tmp_path: Path, tokeniser: Tokeniser) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no " * (50 if i < 2 else 1)} for i in range(20)]
    with pytest.raises(UserError, match=r"2 of 20 rows were dropped.*row 1, field 'rejected'"):
        pairs_of(tmp_path, tokeniser, rows, max_tokens=30)
    assert tables.DROPS.read(tmp_path / "drops.parquet").num_rows == 2
    facts, _ = pairs_of(tmp_path, tokeniser, rows, max_tokens=30, max_dropped=0.1)
    assert facts["kept"] == 18


def test_a_source_of_many_pieces_gives_the_same_table(
    tmp_path: Path, tokeniser: Tokeniser, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ray Data in pieces of 40 rows, or in one piece: the same rows in the same order, the same drops."""
    rows = [{"prompt": f"p{i % 90}", "chosen": "yes", "rejected": "no"} for i in range(100)]
    one = pairs_of(tmp_path, tokeniser, rows, max_dropped=0.2, limit=95)
    monkeypatch.setattr(records, "PIECE_ROWS", 40)
    monkeypatch.setattr(prepare, "PIECES_IN_PLACE", 1)
    many = pairs_of(tmp_path, tokeniser, rows, max_dropped=0.2, limit=95)
    assert many == one
    assert one[0]["duplicates"] == 5


def test_a_wrong_row_in_a_source_of_many_pieces(
    tmp_path: Path, tokeniser: Tokeniser, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Met by a Ray task: the same one line as in the driver."""
    monkeypatch.setattr(records, "PIECE_ROWS", 40)
    monkeypatch.setattr(prepare, "PIECES_IN_PLACE", 1)
    rows = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(100)]
    rows[89]["chosen"] = " "
    with pytest.raises(UserError, match=r"^[^\n]*x.jsonl, line 90, field 'chosen': is empty; fill it[^\n]*$"):
        pairs_of(tmp_path, tokeniser, rows)


def test_a_parquet_file_is_cut_along_its_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small groups are taken together up to 10 rows; one of 200 is unpacked 16 times, of 13 rows each but the last."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(records, "PIECE_ROWS", 10)
    table = pa.table({"prompt": [str(i) for i in range(212)]})
    with pq.ParquetWriter(tmp_path / "x.parquet", table.schema) as writer:
        for start, rows in ((0, 4), (4, 4), (8, 4), (12, 200)):
            writer.write_table(table.slice(start, rows))
    cut = [(piece.start, piece.stop) for piece in records.pieces(str(tmp_path / "x.parquet"), "parquet")]
    large = [(at, min(at + 13, 212)) for at in range(12, 212, 13)]
    assert cut == [(0, 8), (8, 12), *large]
    assert len(large) == 16


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "datasets"])
def test_pieces_join_to_the_whole(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(records, "PIECE_ROWS", 7)
    rows = [{"prompt": f"p{i}", "chosen": "ü" * (i % 5)} for i in range(40)]
    path = tmp_path / f"x.{kind}"
    if kind == "jsonl":
        path.write_text("\n" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=11)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    [(file, told)] = records.find_files(str(path))
    pieces = records.pieces(file, told)
    assert len(pieces) >= 6
    joined = [record for piece in pieces for record in records.read_piece(piece)]
    assert joined == list(records.read_file(file, told))
    assert [record.values for record in joined] == rows
    if kind == "jsonl":
        assert joined[0].row == 2  # as an editor counts lines
