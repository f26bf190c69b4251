"""Rows of a table by id, or in any order, without holding the table in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from allo_ray.tables import Table

BATCH_ROWS = 4096


class Lookup:
    """A table unpacked into a memory-mapped Arrow file; memory holds only its ids and pages in use.

    Use as a context manager: the unpacked file is removed at the end.
    """

    def __init__(self, table: Table, path: str | Path, scratch: str | Path) -> None:
        """Unpacks the table at `path` into a file of its own in the folder `scratch` and indexes its column `id`.

        Raises:
            UserError: nothing is at `path`, or it is another table.
        """
        files = table.files(path)
        if not files:
            table.read(path)  # says what is missing
        Path(scratch).mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(suffix=".arrow", prefix=f".{table.name}-", dir=scratch)
        os.close(handle)
        self._file = Path(name)
        schema = table.schema.remove_metadata()
        with pa.OSFile(str(self._file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for file in files:
                table.check(pq.read_schema(file), file)
                for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS):
                    writer.write_batch(batch.select(schema.names).cast(schema))
        self._map = pa.memory_map(str(self._file))
        reader = pa.ipc.open_file(self._map)
        # Some kilobytes each: their content stays on the disk.
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)], dtype=np.int64)
        parts = [_bytes(batch.column("id").cast(pa.binary()).to_pylist()) for batch in self._batches]
        self.ids: np.ndarray = np.concatenate(parts) if parts else _bytes([])
        self._order = np.argsort(self.ids, kind="stable")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def sorted_rows(self) -> np.ndarray:
        """Row numbers [N] int64 in the order of their ids, which is the same however the table is cut into files."""
        return self._order

    def duplicates(self) -> int:
        """How many rows repeat an id."""
        ordered = self.ids[self._order]
        return int((ordered[1:] == ordered[:-1]).sum())

    def find(self, ids: Sequence[str]) -> np.ndarray:
        """Row numbers int64 of `ids`, -1 for an id that is not here."""
        if not len(self):
            return np.full(len(ids), -1, dtype=np.int64)
        wanted = _bytes([one.encode() for one in ids])
        at = np.minimum(np.searchsorted(self.ids, wanted, sorter=self._order), len(self) - 1)
        rows = self._order[at]
        return np.where(self.ids[rows] == wanted, rows, -1)

    def take(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """The rows at `rows`, in that order; row numbers must not be negative."""
        assert len(rows) == 0 or rows.min() >= 0, "every id must be found before its row is taken"
        if not len(rows):
            return []
        batches = np.searchsorted(self._starts, rows, side="right") - 1
        local = rows - self._starts[batches]
        # One slice a row and one copy of all: a `take` of each batch would cost as much for one row as for a thousand.
        slices = [self._batches[batch].slice(row, 1) for batch, row in zip(batches, local, strict=True)]
        return pa.Table.from_batches(slices).combine_chunks().to_pylist()

    def in_order(self) -> Iterator[dict[str, Any]]:
        """All rows in the order of their ids."""
        for start in range(0, len(self), BATCH_ROWS):
            yield from self.take(self._order[start : start + BATCH_ROWS])

    def __enter__(self) -> Lookup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batches = []
        self._map.close()
        self._file.unlink(missing_ok=True)


def _bytes(ids: list[bytes]) -> np.ndarray:
    """Ids as an array [N] of dtype S, as wide as the longest."""
    return np.array(ids, dtype="S")


def stream(table: Table, path: str | Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows of a table one by one, in the order of its files, holding one batch in memory.

    Raises:
        UserError: nothing is at `path`, or it is another table.
    """
    files = table.files(path)
    if not files:
        table.read(path)
    for file in files:
        table.check(pq.read_schema(file), file)
        for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=columns):
            yield from batch.to_pylist()


def write_stream(
    table: Table, rows: Iterator[dict[str, Any]], path: str | Path, batch_rows: int = 1024
) -> int:
    """Writes rows to one Parquet file, a row group at a time, and returns how many there were.

    The file gets its name only when it is complete.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    count, batch = 0, []
    with pq.ParquetWriter(part, table.schema, compression="zstd") as writer:
        for row in rows:
            batch.append(row)
            if len(batch) == batch_rows:
                writer.write_table(table.build(batch))
                count, batch = count + len(batch), []
        if batch or count == 0:
            writer.write_table(table.build(batch))
    part.rename(path)
    return count + len(batch)
