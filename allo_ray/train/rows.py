"""Training rows as the loop sees them, and which of them each worker trains.

A global batch is rows [b*B, (b+1)*B) of the TRAIN_ROWS table, whatever the number of workers. Every worker reads
the whole ordered stream and keeps its own share: so all of them know the size of the global batch, the number of
micro-batches of every worker, and the ids of every row, without a message.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa

Side = Literal["pair", "chosen", "rejected"]


@dataclass(frozen=True, eq=False)
class Row:
    """One instance. Ids are int32, log-probs (nats) and weights float32, each as long as its response or empty."""

    position: int
    id: str
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_reference: np.ndarray
    rejected_reference: np.ndarray
    rejected_weight: np.ndarray

    def responses(self, side: Side) -> list[np.ndarray]:
        """The responses that the method trains on."""
        return {"pair": [self.chosen, self.rejected], "chosen": [self.chosen], "rejected": [self.rejected]}[
            side
        ]

    def tokens(self, side: Side) -> int:
        """Tokens the model reads for this row: the prompt once, then each response without its last token."""
        return len(self.prompt) + sum(len(response) - 1 for response in self.responses(side))

    def weighted(self, side: Side) -> int:
        """Tokens that carry loss before the current policy is asked."""
        kept = len(self.chosen) if side != "rejected" else 0
        if side != "chosen":
            kept += (
                int(np.count_nonzero(self.rejected_weight))
                if len(self.rejected_weight)
                else len(self.rejected)
            )
        return kept


def rows_of(table: pa.Table | pa.RecordBatch) -> list[Row]:
    """Turns TRAIN_ROWS columns into rows."""
    columns = {name: table.column(name) for name in table.schema.names}
    ids, positions = columns["id"].to_pylist(), columns["position"].to_pylist()
    lists = {
        name: _lists(columns[name])
        for name in (
            "prompt_ids",
            "chosen_ids",
            "rejected_ids",
            "chosen_reference",
            "rejected_reference",
            "rejected_weight",
        )
    }
    return [
        Row(position, name, *(lists[column][at] for column in lists))
        for at, (position, name) in enumerate(zip(positions, ids, strict=True))
    ]


def _lists(column: pa.Array | pa.ChunkedArray) -> list[np.ndarray]:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of no chunk at all
        return []
    offsets = array.offsets.to_numpy()
    values = array.values.to_numpy(zero_copy_only=False)
    return [values[start:end] for start, end in zip(offsets[:-1], offsets[1:], strict=True)]


def global_batches(tables: Iterable[pa.Table], batch_size: int, first: int = 0) -> Iterator[list[Row]]:
    """Cuts an ordered stream of TRAIN_ROWS into global batches, from batch number `first` on.

    The stream may begin anywhere before that batch; rows already trained are dropped. The last batch may be short.

    Raises:
        AssertionError: the stream lost, doubled or reordered a row.
    """
    waiting: list[Row] = []
    expected = first * batch_size
    for table in tables:
        for row in rows_of(table):
            if row.position < first * batch_size:
                continue
            assert row.position == expected, f"row {row.position} arrived where row {expected} was due"
            expected += 1
            waiting.append(row)
            if len(waiting) == batch_size:
                yield waiting
                waiting = []
    if waiting:
        yield waiting


def micro_batches(rows: Sequence[Row], side: Side, workers: int, worker: int, budget: int) -> list[list[Row]]:
    """The micro-batches of one worker: of at most `budget` tokens (one row may exceed it), equally many on each worker.

    Rows of like length go together, so that the attention grid holds little padding. A worker with too few rows gets
    empty lists in the place of the missing micro-batches: it must take part in the collective calls all the same.
    """
    ordered = sorted(rows, key=lambda row: (-row.tokens(side), row.position))
    shares: list[list[Row]] = [[] for _ in range(workers)]
    for at, row in enumerate(ordered):
        turn, seat = divmod(at, workers)
        shares[seat if turn % 2 == 0 else workers - 1 - seat].append(row)
    cuts = [_cut(share, side, budget) for share in shares]
    wanted = max(len(cut) for cut in cuts)
    mine = cuts[worker]
    while len(mine) < wanted:
        largest = max(range(len(mine)), key=lambda at: len(mine[at]), default=None)
        if largest is None or len(mine[largest]) < 2:
            mine.append([])
            continue
        whole = mine[largest]
        mine[largest : largest + 1] = [whole[: len(whole) // 2], whole[len(whole) // 2 :]]
    return mine


def _cut(rows: list[Row], side: Side, budget: int) -> list[list[Row]]:
    total = sum(row.tokens(side) for row in rows)
    parts = -(-total // budget)
    out: list[list[Row]] = []
    filled = 0
    for row in rows:
        length = row.tokens(side)
        # Even parts: the last micro-batch is not a small remainder of the others.
        if not out or filled + length > budget or filled >= total / parts:
            out.append([])
            filled = 0
        out[-1].append(row)
        filled += length
    return out
