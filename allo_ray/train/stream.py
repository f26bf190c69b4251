"""The ordered stream of rows, read ahead in the background from the first moment of a worker."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

#: Rows of one read; tables waiting for the loop at most.
READ_ROWS, AHEAD = 512, 4


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
