"""Which rows make a batch, and whose they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_ray import tables
from allo_ray.train.rows import Row, global_batches, micro_batches, rows_of

EMPTY = np.zeros(0, dtype=np.float32)


def row_of(position: int, length: int) -> Row:
    ids = np.arange(1, length + 1, dtype=np.int32)
    return Row(position, str(position), ids, ids, ids, EMPTY, EMPTY, EMPTY)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 5), st.integers(20, 200))
def test_every_row_is_trained_once_by_one_worker(lengths: list[int], workers: int, budget: int) -> None:
    rows = [row_of(at, length) for at, length in enumerate(lengths)]
    shares = [micro_batches(rows, "pair", workers, worker, budget) for worker in range(workers)]
    assert len({len(share) for share in shares}) == 1, "all workers take equally many collective calls"
    trained = [row.position for share in shares for part in share for row in part]
    assert sorted(trained) == list(range(len(rows)))
    for part in (part for share in shares for part in share):
        assert len(part) <= 1 or sum(row.tokens("pair") for row in part) <= budget


def test_tokens_counts_what_the_model_reads(make_rows: Callable[..., list[Row]]) -> None:
    """Prompt of 4, responses of 3 and 2: 4 + 2 + 1 = 7, since the last token of a response is never read."""
    ids = np.arange(10, dtype=np.int32)
    row = Row(0, "a", ids[:4], ids[:3], ids[:2], EMPTY, EMPTY, np.array([0, 1], dtype=np.float32))
    assert (row.tokens("pair"), row.tokens("chosen"), row.tokens("rejected")) == (7, 6, 5)
    assert (row.weighted("pair"), row.weighted("chosen"), row.weighted("rejected")) == (4, 3, 1)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_global_batches_do_not_depend_on_how_the_stream_is_cut(first: int) -> None:
    table = table_of(23)
    whole = list(global_batches([table], 5, first))
    pieces = [table.slice(0, 1), table.slice(1, 12), table.slice(13, 0), table.slice(13)]
    cut = list(global_batches(pieces, 5, first))
    positions = [[row.position for row in batch] for batch in whole]
    assert positions == [[row.position for row in batch] for batch in cut]
    assert positions[0] == list(range(5 * first, 5 * first + 5))
    assert positions[-1] == [20, 21, 22]


def test_a_lost_or_doubled_row_is_noticed() -> None:
    table = table_of(6)
    with pytest.raises(AssertionError, match="row 3 arrived where row 2 was due"):
        list(global_batches([table.slice(0, 2), table.slice(3)], 2))
    with pytest.raises(AssertionError):
        list(global_batches([table, table], 2))


def test_rows_of_a_table_keep_every_column() -> None:
    rows = rows_of(table_of(3).slice(1))
    assert [row.position for row in rows] == [1, 2]
    assert rows[0].prompt.tolist() == [1, 2]
    assert rows[0].rejected.tolist() == [1, 2, 3]
    assert rows[1].rejected_weight.tolist() == [0.5, 0.5, 0.5]
    assert len(rows[1].chosen_reference) == 0
    assert replace(rows[0]).id == "1"


def table_of(count: int):
    """Rows with positions 0 ... count - 1."""
    return tables.TRAIN_ROWS.build(
        {
            "position": at,
            "id": str(at),
            "prompt_ids": [1, 2],
            "chosen_ids": [7],
            "rejected_ids": [1, 2, 3],
            "chosen_reference": [],
            "rejected_reference": [-1.0, -2.0, -3.0],
            "rejected_weight": [0.5, 0.5, 0.5],
        }
        for at in range(count)
    )
