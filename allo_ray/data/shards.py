"""A folder of published shards: what a batch job has finished, which rows it gave up, and who may write.

    params.json        what decides the content; another job is refused here
    owner.json         the newest run; an older one that still lives finds out before it publishes
    <name>.parquet     shards, named by the hash of the input rows they answer: a repeated batch overwrites itself
    rejected/*.jsonl   rows that were left out, each with its reason
    attempts/*         batches under way; one that is still here when its batch comes again killed its engine

A file appears whole or not at all: by rename on a local file system, by the store's own put elsewhere.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from allo_ray.errors import UserError
from allo_ray.tables import Table

#: Bytes of the hash that stands for a row's id where millions are compared.
_ID_BYTES = 12
_READERS = 16
#: Tells the attempts of this process from those of the processes before it.
_PROCESS = uuid.uuid4().hex


class Superseded(RuntimeError):
    """A newer run has taken the folder over."""


@dataclass(frozen=True)
class Rejected:
    """An input row without a result. kind: "invalid" (a rule) or "killed" (its engine died on it, twice)."""

    id: str
    kind: str
    reason: str


@dataclass
class Shards:
    """Cheap to pickle: holds a URL, opens the file system where it is used.

    `key` is the column of the results that holds the id of the input row.
    """

    url: str
    table: Table
    key: str
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)

    def claim(self, params: Mapping[str, Any]) -> None:
        """Makes this run the folder's owner.

        Raises:
            UserError: results made with other parameters are there; says what differs.
        """
        text = json.dumps(dict(params), indent=1, sort_keys=True)
        found = self._read("params.json")
        if found is not None and (differences := _differences(json.loads(found), json.loads(text))):
            raise UserError(
                f"{self.url}: made with other parameters ({'; '.join(differences)}). "
                "Give another output folder, or the parameters of the first run."
            )
        self._write("owner.json", json.dumps({"run": self.owner}).encode())
        self._write("params.json", text.encode())
        files, root = self._open()
        if files.exists(f"{root}/attempts"):
            # A run that was killed says nothing of its rows: only engines that die within this run count.
            files.rm(f"{root}/attempts", recursive=True)
        files.makedirs(f"{root}/attempts", exist_ok=True)

    def done(self) -> np.ndarray:
        """Sorted hashes of the ids of all input rows that have a result or were rejected; see `hash_ids`."""
        files, root = self._open()

        def ids(name: str) -> np.ndarray:
            with files.open(name, "rb") as file:
                column = pq.read_table(file, columns=[self.key]).column(self.key)
            return hash_ids(column.unique().to_pylist())

        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(ids, sorted(files.glob(f"{root}/*.parquet"))))
        found.append(hash_ids([row.id for row in self.rejected()]))
        return np.unique(np.concatenate(found))

    def rejected(self) -> list[Rejected]:
        """All rows that were left out."""
        files, root = self._open()
        rows: list[Rejected] = []
        for name in sorted(files.glob(f"{root}/rejected/*.jsonl")):
            with files.open(name, "rt") as file:
                rows.extend(Rejected(**json.loads(line)) for line in file)
        return rows

    def read(self) -> pa.Table:
        """All results in the order of their input ids (and `index`), each input row once."""
        files, root = self._open()
        parts = []
        for name in sorted(files.glob(f"{root}/*.parquet")):
            with files.open(name, "rb") as file:
                self.table.check(pq.read_schema(file), name)
                parts.append(pq.read_table(file, schema=self.table.schema))
        whole = pa.concat_tables(parts) if parts else self.table.schema.empty_table()
        columns = [self.key, "index"] if "index" in self.table.schema.names else [self.key]
        whole = whole.sort_by([(column, "ascending") for column in columns])
        keys = list(zip(*(whole.column(column).to_pylist() for column in columns), strict=True))
        fresh = [i == 0 or keys[i] != keys[i - 1] for i in range(len(keys))]
        return whole if all(fresh) else whole.filter(pa.array(fresh))

    def has(self, name: str) -> bool:
        """Is the shard `name` published?"""
        files, root = self._open()
        return files.exists(f"{root}/{name}.parquet")

    def publish(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes a shard. Raises Superseded where a newer run owns the folder."""
        found = self._read("owner.json")
        if found is None or json.loads(found)["run"] != self.owner:
            raise Superseded(f"{self.url}: another run has taken this folder over; this one stops")
        buffer = io.BytesIO()
        pq.write_table(self.table.build(rows), buffer, compression="zstd")
        self._write(f"{name}.parquet", buffer.getvalue())

    def reject(self, name: str, rows: Sequence[Rejected]) -> None:
        """Writes down rows that get no result."""
        lines = "".join(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows)
        self._write(f"rejected/{name}.jsonl", lines.encode())

    def summarise(self, facts: Mapping[str, Any]) -> None:
        """Writes `summary.json`."""
        self._write("summary.json", json.dumps(dict(facts), indent=1, sort_keys=True).encode())

    def deaths(self, name: str) -> list[str]:
        """Why the attempts on `name` that were begun and not ended came to nothing."""
        files, root = self._open()
        told = []
        for path in sorted(files.glob(f"{root}/attempts/{name}.*")):
            with files.open(path, "rt") as file:
                told.append(json.load(file)["reason"])
        return told

    def begin(self, name: str) -> None:
        """Notes that work on `name` starts."""
        self.blame(name, "its process died (killed, out of memory, or crashed)")

    def blame(self, name: str, reason: str) -> None:
        """Notes why the attempt on `name` that is under way is about to end."""
        self._write(f"attempts/{name}.{_PROCESS}", json.dumps({"reason": reason}).encode())

    def end(self, name: str) -> None:
        """Forgets the attempts on `name`: it is done."""
        files, root = self._open()
        for path in files.glob(f"{root}/attempts/{name}.*"):
            files.rm_file(path)

    def _open(self) -> tuple[Any, str]:
        files, root = fsspec.core.url_to_fs(self.url)
        return files, root.rstrip("/")

    def _read(self, name: str) -> bytes | None:
        files, root = self._open()
        try:
            return files.cat_file(f"{root}/{name}")
        except FileNotFoundError:
            return None

    def _write(self, name: str, content: bytes) -> None:
        files, root = self._open()
        path = f"{root}/{name}"
        files.makedirs(str(PurePosixPath(path).parent), exist_ok=True)
        if isinstance(files, LocalFileSystem):
            part = f"{path}.{uuid.uuid4().hex}.part"
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        else:
            files.pipe_file(path, content)


def hash_ids(ids: Sequence[str]) -> np.ndarray:
    """One 12-byte hash for each id [N], dtype S12: a set of ten million takes 120 MB, not a gigabyte of strings."""
    digests = [hashlib.blake2b(one.encode(), digest_size=_ID_BYTES).digest() for one in ids]
    return np.frombuffer(b"".join(digests), dtype=f"V{_ID_BYTES}").view(f"S{_ID_BYTES}")


def name_of(ids: Sequence[str]) -> str:
    """Name of the shard that answers the input rows `ids`."""
    return hashlib.blake2b("\x00".join(ids).encode(), digest_size=12).hexdigest()


def _differences(old: Any, new: Any, at: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [
            line
            for key in keys
            for line in _differences(old.get(key), new.get(key), f"{at}.{key}".lstrip("."))
        ]
    return [] if old == new else [f"{at}: {json.dumps(old)} there, {json.dumps(new)} asked for"]
