"""Schemas are enforced and versioned; ids depend on content alone."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from allo_ray import tables
from allo_ray.errors import UserError


def test_a_table_survives_its_file(tmp_path: Path) -> None:
    rows = [{"id": "a", "chosen": [-0.5, -1.25], "rejected": []}]
    tables.LOGPROBS.write(rows, tmp_path / "one.parquet")
    assert tables.LOGPROBS.read(tmp_path / "one.parquet").to_pylist() == rows


def test_shards_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        tables.TOKEN_SCORES.write([{"id": name, "p_re": [1.0]}], tmp_path / f"{name}.parquet")
    assert tables.TOKEN_SCORES.read(tmp_path)["id"].to_pylist() == ["a", "b", "c"]


def test_another_table_another_version_and_nothing_are_user_errors(tmp_path: Path) -> None:
    tables.LOGPROBS.write([], tmp_path / "logprobs.parquet")
    with pytest.raises(UserError, match="expected the table 'pairs'"):
        tables.PAIRS.read(tmp_path / "logprobs.parquet")
    pq.write_table(pa.table({"id": ["x"]}), tmp_path / "foreign.parquet")
    with pytest.raises(UserError, match="a foreign file"):
        tables.PAIRS.read(tmp_path / "foreign.parquet")
    with pytest.raises(UserError, match="no pairs table"):
        tables.PAIRS.read(tmp_path / "nowhere.parquet")


def test_ids_tell_parts_apart() -> None:
    """'ab' + 'c' and 'a' + 'bc' are different content; equal content has an equal id."""
    assert tables.content_id("ab", "c") != tables.content_id("a", "bc")
    assert tables.content_id("ab", 1) == tables.content_id("ab", "1")
    assert len(tables.content_id("")) == 16
