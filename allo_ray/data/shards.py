"""A folder of published shards: what a batch job has finished, which rows it gave up, and who may write.

    params.json        what decides the content; another job is refused here
    owner.json         the newest run; an older one that still lives finds out before it publishes
    <name>.parquet     shards, named by the hash of the input rows they answer: a repeated batch overwrites itself
    rejected/*.jsonl   rows that were left out, each with its reason
    index/*.npz        which rows the files above answer, see `shard_index`
    attempts/*         batches under way; one that is still here when its batch comes again killed its engine
    alone/*            answers of a batch that is done row by row, until its shard is complete

Whatever happens to a batch within a run, its rows are published under its one name: none is there twice. A file
appears whole or not at all: by rename on a local file system, by the store's own put elsewhere.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from allo_ray.data.shard_index import Answered
from allo_ray.errors import UserError
from allo_ray.tables import Table

_READERS = 16
#: Attempts that ended with their node say nothing of their rows, unless so many nodes were lost over the same ones.
LOST_NODES = 3
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

    def check(self, params: Mapping[str, Any]) -> None:
        """Writes nothing.

        Raises:
            UserError: results made with other parameters are there; says what differs.
        """
        try:
            found = self._read("params.json")
        except (NotADirectoryError, PermissionError) as error:
            raise UserError(
                f"{self.url}: is no folder to write to ({error.strerror}). Give another `out`."
            ) from None
        told = json.loads(json.dumps(dict(params)))
        if found is not None and (differences := _differences(json.loads(found), told)):
            raise UserError(
                f"{self.url}: made with other parameters ({'; '.join(differences)}). "
                "Give another output folder, or the parameters of the first run."
            )

    def claim(self, params: Mapping[str, Any]) -> None:
        """Makes this run the folder's owner. Raises UserError as `check`."""
        self.check(params)
        self._write("owner.json", json.dumps({"run": self.owner}).encode())
        self._write("params.json", json.dumps(dict(params), indent=1, sort_keys=True).encode())
        files, root = self._open()
        for folder in ("attempts", "alone"):
            if files.exists(f"{root}/{folder}"):
                # A run that was killed says nothing of its rows: only engines that die within this run count.
                files.rm(f"{root}/{folder}", recursive=True)
        files.makedirs(f"{root}/attempts", exist_ok=True)

    def done(self) -> np.ndarray:
        """Sorted hashes of the ids of all input rows that have a result or were rejected; see `shard_index`.

        Opens the shards that no index file names (those after the last index file of a run that was killed).
        """
        there = np.array([name.encode() for name in self._listed()], dtype="S")
        with ThreadPoolExecutor(_READERS) as pool:
            known = Answered.join(list(pool.map(self._index, self._list("index", ".npz"))))
            unnamed = [name.decode() for name in np.setdiff1d(there, known.files)]
            opened = Answered.join(list(pool.map(self._opened, unnamed)))
        self.index(opened)
        return np.unique(np.concatenate([known.among(there), opened.hashes]))

    def index(self, answered: Answered) -> None:
        """Writes down which rows some files answer, for `done`."""
        if len(answered.files):
            self._write(f"index/{self.owner}-{uuid.uuid4().hex}.npz", answered.to_bytes())

    def rejected(self) -> list[Rejected]:
        """All rows that were left out."""
        with ThreadPoolExecutor(_READERS) as pool:
            found = pool.map(self._rejected, self._list("rejected", ".jsonl"))
            return [row for rows in found for row in rows]

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
        return files.exists(f"{root}/{self.file(name)}")

    def publish(self, name: str, rows: Iterable[Mapping[str, Any]]) -> str:
        """Writes a shard and returns its file's name. Raises Superseded where a newer run owns the folder."""
        content = self._parquet(rows)
        found = self._read("owner.json")
        if found is None or json.loads(found)["run"] != self.owner:
            raise Superseded(f"{self.url}: another run has taken this folder over; this one stops")
        self._write(self.file(name), content)
        return self.file(name)

    def keep(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Keeps the answers to a part of a batch, for this run only."""
        self._write(f"alone/{name}", self._parquet(rows))

    def kept(self, name: str) -> list[dict[str, Any]] | None:
        """The answers that were kept under `name`, None where there are none."""
        found = self._read(f"alone/{name}")
        return None if found is None else pq.read_table(io.BytesIO(found)).to_pylist()

    def file(self, name: str) -> str:
        """The file of the shard `name`."""
        return f"{name}.parquet"

    def reject(self, name: str, rows: Sequence[Rejected]) -> str:
        """Writes down rows that get no result; returns the file's name."""
        lines = "".join(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows)
        self._write(f"rejected/{name}.jsonl", lines.encode())
        return f"rejected/{name}.jsonl"

    def summarise(self, facts: Mapping[str, Any]) -> None:
        """Writes `summary.json`."""
        self._write("summary.json", json.dumps(dict(facts), indent=1, sort_keys=True).encode())

    def deaths(self, name: str, alive: Callable[[], Collection[str]]) -> list[str]:
        """Why the attempts on `name` that were begun and not ended came to nothing.

        Those that were lost with their node do not count, unless LOST_NODES were.

        Args:
            alive: gives the ids of the nodes that the cluster has now.
        """
        files, root = self._open()
        told = []
        for path in sorted(files.glob(f"{root}/attempts/{name}.*")):
            with files.open(path, "rt") as file:
                told.append(json.load(file))
        there = alive() if told else ()
        stayed = [one["reason"] for one in told if one["node"] in there]
        return [one["reason"] for one in told] if len(told) - len(stayed) >= LOST_NODES else stayed

    def begin(self, name: str, node: str) -> None:
        """Notes that work on `name` starts, and at which node."""
        self.blame(name, node, "its process died (killed, out of memory, or crashed)")

    def blame(self, name: str, node: str, reason: str) -> None:
        """Notes why the attempt on `name` that is under way at a node is about to end."""
        self._write(f"attempts/{name}.{_PROCESS}", json.dumps({"node": node, "reason": reason}).encode())

    def end(self, name: str) -> None:
        """Forgets the attempts on `name`: it is done."""
        files, root = self._open()
        for path in files.glob(f"{root}/attempts/{name}.*"):
            files.rm_file(path)

    def _listed(self) -> list[str]:
        """Names of all files that answer rows."""
        return [*self._list("", ".parquet"), *self._list("rejected", ".jsonl")]

    def _list(self, folder: str, suffix: str) -> list[str]:
        """Sorted names, from the root on, of the files in a folder; takes no look at the files themselves."""
        files, root = self._open()
        files.invalidate_cache()
        try:
            found = files.ls(f"{root}/{folder}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        names = [path.rsplit("/", 1)[-1] for path in found if path.endswith(suffix)]
        return sorted(f"{folder}/{name}" if folder else name for name in names)

    def _opened(self, name: str) -> Answered:
        """What a file answers, from the file itself."""
        if name.endswith(".jsonl"):
            return Answered.of([name], [[row.id for row in self._rejected(name)]])
        files, root = self._open()
        with files.open(f"{root}/{name}", "rb") as file:
            ids = pq.read_table(file, columns=[self.key]).column(self.key)
        return Answered.of([name], [ids.unique().to_pylist()])

    def _parquet(self, rows: Iterable[Mapping[str, Any]]) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(self.table.build(rows), buffer, compression="zstd")
        return buffer.getvalue()

    def _rejected(self, name: str) -> list[Rejected]:
        files, root = self._open()
        return [Rejected(**json.loads(line)) for line in files.cat_file(f"{root}/{name}").splitlines()]

    def _index(self, name: str) -> Answered:
        files, root = self._open()
        return Answered.from_bytes(files.cat_file(f"{root}/{name}"))

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
