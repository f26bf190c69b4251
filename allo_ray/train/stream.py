"""The ordered stream of rows, read ahead in the background from the first moment of a worker."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    import ray.data

#: Rows of one read; tables waiting for the loop at most.
READ_ROWS, AHEAD = 512, 4


def read(files: Sequence[Path], columns: Sequence[str]) -> ray.data.Dataset:
    """Parquet files in the order of their rows, by a task that takes no CPU: a cluster whose CPUs are all held by those
    who wait for these rows reads them all the same (Ray's own reader looks at files with tasks of one CPU)."""
    import ray.data

    rows = ray.data.from_arrow(pa.table({"file": [str(file) for file in files]})).map_batches(
        partial(_rows, columns=list(columns)),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0,
        concurrency=1,
    )
    rows.context.execution_options.preserve_order = True
    rows.context.enable_progress_bars = False
    return rows


def _rows(one: pa.Table, columns: list[str]) -> Iterator[pa.Table]:
    with pq.ParquetFile(one["file"][0].as_py()) as file:
        for batch in file.iter_batches(READ_ROWS, columns=columns):
            yield pa.Table.from_batches([batch])


class RowStream:
    """Iterates once over a Ray Data iterator. Reading may begin at once, beside the loading of the model."""

    def __init__(self, shard: Any, begin: bool) -> None:
        self._tables: queue.Queue[pa.Table | BaseException | None] = queue.Queue(maxsize=AHEAD)
        self._closed = False
        self._thread = threading.Thread(target=self._read, args=(shard,), name="rows", daemon=True)
        if begin:
            self._thread.start()

    def _read(self, shard: Any) -> None:
        try:
            for table in shard.iter_batches(batch_size=READ_ROWS, batch_format="pyarrow", prefetch_batches=1):
                self._tables.put(table)
                if self._closed:
                    return
            self._tables.put(None)
        except BaseException as error:
            self._tables.put(error)

    def __iter__(self) -> Iterator[pa.Table]:
        if self._thread.ident is None:
            self._thread.start()
        while (table := self._tables.get()) is not None:
            if isinstance(table, BaseException):
                raise table
            yield table

    def close(self) -> None:
        """Ends the reading, also where not all was taken."""
        self._closed = True
        with suppress(queue.Empty):
            while True:
                self._tables.get_nowait()
