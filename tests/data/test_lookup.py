"""Rows by id from disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from allo_ray import tables
from allo_ray.data.lookup import BATCH_ROWS, Lookup, stream, write_stream
from allo_ray.errors import UserError


def rows(count: int) -> list[dict]:
    return [{"id": f"{i:x}", "p_re": [float(i), 0.5]} for i in range(count)]


def test_take_gives_rows_in_the_order_asked_for(tmp_path: Path) -> None:
    """Over the borders of batches and files, ids of different lengths among them."""
    count = 2 * BATCH_ROWS + 10
    every = rows(count)
    write_stream(tables.TOKEN_SCORES, iter(every[: BATCH_ROWS + 5]), tmp_path / "t" / "0.parquet")
    write_stream(tables.TOKEN_SCORES, iter(every[BATCH_ROWS + 5 :]), tmp_path / "t" / "1.parquet")
    with Lookup(tables.TOKEN_SCORES, tmp_path / "t", tmp_path / "scratch") as known:
        assert len(known) == count
        assert known.duplicates() == 0
        wanted = np.random.default_rng(1).permutation(count)[:500]
        ids = [every[i]["id"] for i in wanted]
        found = known.find([*ids, "nowhere", "ff" * 20])
        assert (found[-2:] == -1).all()
        assert known.take(found[:-2]) == [every[i] for i in wanted]
        assert known.ids[known.sorted_rows].tolist() == sorted(row["id"].encode() for row in every)
    assert not list((tmp_path / "scratch").iterdir())


def test_ids_in_any_script(tmp_path: Path) -> None:
    tables.TOKEN_SCORES.write([{"id": one, "p_re": []} for one in ("é", "你好", "a")], tmp_path / "t.parquet")
    with Lookup(tables.TOKEN_SCORES, tmp_path / "t.parquet", tmp_path) as known:
        found = known.find(["你好", "a", "ü"])
        assert found.tolist() == [1, 2, -1]
        assert known.take(found[:2])[0]["id"] == "你好"


def test_two_lookups_of_one_table_share_a_folder(tmp_path: Path) -> None:
    tables.TOKEN_SCORES.write(rows(3), tmp_path / "t.parquet")
    with (
        Lookup(tables.TOKEN_SCORES, tmp_path / "t.parquet", tmp_path) as one,
        Lookup(tables.TOKEN_SCORES, tmp_path / "t.parquet", tmp_path) as two,
    ):
        assert one.take(one.find(["2"])) == two.take(two.find(["2"]))


def test_an_empty_table_has_no_ids(tmp_path: Path) -> None:
    tables.TOKEN_SCORES.write([], tmp_path / "t.parquet")
    with Lookup(tables.TOKEN_SCORES, tmp_path / "t.parquet", tmp_path) as known:
        assert known.find(["a"]).tolist() == [-1]
        assert known.take(np.empty(0, np.int64)) == []


def test_nothing_there_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no token_scores table"):
        Lookup(tables.TOKEN_SCORES, tmp_path / "none", tmp_path)
    with pytest.raises(UserError, match="no token_scores table"):
        next(stream(tables.TOKEN_SCORES, tmp_path / "none"))


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken():
        yield rows(1)[0]
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_stream(tables.TOKEN_SCORES, broken(), tmp_path / "t.parquet")
    assert not (tmp_path / "t.parquet").exists()
    assert write_stream(tables.TOKEN_SCORES, iter(rows(2050)), tmp_path / "t.parquet") == 2050
    assert list(stream(tables.TOKEN_SCORES, tmp_path / "t.parquet")) == rows(2050)
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]
