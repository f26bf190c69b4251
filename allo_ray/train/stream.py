"""The ordered stream of rows, read ahead in the background from the first moment of a worker."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    import ray.data

#: Rows of one read; tables waiting for the loop at most.
READ_ROWS, AHEAD = 512, 4


def read(path: str, columns: Sequence[str]) -> ray.data.Dataset:
    """A Parquet table in the order of its rows, by one task at a time, which takes no CPU: a cluster whose CPUs are all
    held by those who wait for these rows reads them all the same."""
    import ray.data

    rows = ray.data.read_parquet(path, columns=list(columns), ray_remote_args={"num_cpus": 0}, concurrency=1)
    rows.context.execution_options.preserve_order = True
    rows.context.enable_progress_bars = False
    return rows


class RowStream:
    """Iterates once over a Ray Data iterator. Reading begins at once, so that it overlaps the loading of the model."""

    def __init__(self, shard: Any) -> None:
        self._tables: queue.Queue[pa.Table | BaseException | None] = queue.Queue(maxsize=AHEAD)
        self._thread = threading.Thread(target=self._read, args=(shard,), name="rows", daemon=True)
        self._thread.start()

    def _read(self, shard: Any) -> None:
        try:
            for table in shard.iter_batches(batch_size=READ_ROWS, batch_format="pyarrow", prefetch_batches=1):
                self._tables.put(table)
            self._tables.put(None)
        except BaseException as error:
            self._tables.put(error)

    def __iter__(self) -> Iterator[pa.Table]:
        while (table := self._tables.get()) is not None:
            if isinstance(table, BaseException):
                raise table
            yield table
