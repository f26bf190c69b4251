"""Rows of the files that users bring: JSON lines, JSON, CSV, Parquet, `datasets` folders and hub names.

Rows are read one by one, from any file system that fsspec opens, and carry the number by which a user finds them:
the line of a text file (from 1), the row of anything else (from 0).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import fsspec
import pyarrow.parquet as pq

from allo_ray.errors import UserError

Format = Literal["jsonl", "json", "csv", "parquet", "datasets", "hub"]
_SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
#: Rows of one piece of work where a source is read in pieces.
PIECE_ROWS = 2048
PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class Piece:
    """A stretch of one file: rows from `first` on; `start` and `stop` are bytes (jsonl) or row numbers (else)."""

    file: str
    kind: Format
    split: str
    start: int
    stop: int
    first: int


@dataclass(frozen=True)
class Record:
    """One row and where it stands."""

    file: str
    row: int
    values: dict[str, Any]

    @property
    def place(self) -> str:
        lines = self.file.lower().endswith((".jsonl", ".ndjson", ".csv", ".tsv"))
        return f"{self.file}, {'line' if lines else 'row'} {self.row}"


def find_files(path: str, kind: str = "auto", split: str = "train") -> list[tuple[str, Format]]:
    """The files of a source with the format of each, in the order of their names.

    A folder counts with all its files of one known format; a `datasets` folder and a hub name count as one file.

    Raises:
        UserError: nothing is there, or its format cannot be told.
    """
    if kind == "hub":
        return [(path, "hub")]
    files, root = _open_fs(path)
    if any(sign in path for sign in "*?["):
        names = sorted(files.glob(root))
        if not names:
            raise UserError(f"{path}: no file matches this pattern")
    elif files.isdir(root):
        if files.exists(f"{root}/state.json") or files.exists(f"{root}/dataset_dict.json"):
            return [(path, "datasets")]
        names = sorted(name for name in files.find(root) if _suffix(name) in _SUFFIXES)
        if not names:
            raise UserError(
                f"{path}: the folder holds no JSON, CSV or Parquet file and is no `datasets` folder"
            )
    elif files.exists(root):
        names = [root]
    elif "://" not in path and path.count("/") <= 1 and not _suffix(path) and not path.startswith((".", "/")):
        return [(path, "hub")]
    else:
        raise UserError(f"{path}: no such file or folder. Check the path.")
    if kind == "datasets":
        raise UserError(f"{path}: is no `datasets` folder (made with save_to_disk)")
    out: list[tuple[str, Format]] = []
    for name in names:
        told = _SUFFIXES.get(_suffix(name)) if kind == "auto" else kind
        if told is None:
            raise UserError(f"{name}: cannot tell its format from its name; set `format` to jsonl or parquet")
        out.append((files.unstrip_protocol(name) if "://" in path else name, cast(Format, told)))
    return out


def records(path: str, kind: str = "auto", split: str = "train") -> Iterator[Record]:
    """Yields the rows of all files of a source, holding one of them in memory (JSON arrays: one file).

    Raises:
        UserError: a file cannot be read, or a line of it is no JSON object; names the file and the line.
    """
    for file, told in find_files(path, kind, split):
        yield from read_file(file, told, split)


@contextmanager
def _told_apart(file: str) -> Iterator[None]:
    """Turns what is wrong with a file into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is no UTF-8 text ({error}). Convert it to UTF-8.") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: cannot be read ({_first_line(error)}). Check the file and its format."
        ) from None


def read_file(file: str, kind: Format, split: str = "train") -> Iterator[Record]:
    """Yields the rows of one file."""
    with _told_apart(file):
        if kind == "jsonl":
            yield from _json_lines(file, 0, None, 1)
        elif kind == "parquet":
            with fsspec.open(file, "rb") as stream:
                row = 0
                for batch in pq.ParquetFile(stream).iter_batches(PIECE_ROWS):
                    for values in batch.to_pylist():
                        yield Record(file, row, values)
                        row += 1
        elif kind == "json":
            yield from _json(file)
        elif kind == "csv":
            with fsspec.open(file, "rt", encoding="utf-8-sig", newline="") as text:
                reader = csv.DictReader(text, delimiter="\t" if _suffix(file) == ".tsv" else ",")
                for values in reader:
                    yield Record(file, reader.line_num, dict(values))
        else:
            for row, values in enumerate(_dataset(file, kind, split)):
                yield Record(file, row, dict(values))


def pieces(file: str, kind: Format, split: str = "train") -> list[Piece]:
    """Cuts a file into pieces that can be read apart, in order. A file of text is passed through once for that."""
    if kind == "jsonl":
        with _told_apart(file):
            return _line_pieces(file)
    if kind == "parquet":
        with _told_apart(file), fsspec.open(file, "rb") as stream:
            told = pq.ParquetFile(stream).metadata
        groups = [told.row_group(group).num_rows for group in range(told.num_row_groups)]
        return [Piece(file, kind, split, start, stop, start) for start, stop in _group_pieces(groups)]
    if kind in ("datasets", "hub"):
        count = len(_dataset(file, kind, split))
    else:
        return [Piece(file, kind, split, 0, -1, 0)]
    starts = range(0, count, PIECE_ROWS)
    return [Piece(file, kind, split, start, min(count, start + PIECE_ROWS), start) for start in starts]


def _group_pieces(groups: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of pieces of a Parquet file with so many rows in its groups.

    Whoever reads a part of a group unpacks all of it, so a large group makes at most 16 pieces.
    """
    start = stop = 0
    for rows in groups:
        if stop > start and stop - start + rows > PIECE_ROWS:
            yield start, stop
            start = stop
        if rows > PIECE_ROWS:
            step = max(PIECE_ROWS, -(-rows // 16))
            yield from ((at, min(at + step, stop + rows)) for at in range(stop, stop + rows, step))
            start = stop + rows
        stop += rows
    if stop > start:
        yield start, stop


def read_piece(piece: Piece) -> Iterator[Record]:
    """Yields the rows of a piece."""
    with _told_apart(piece.file):
        if piece.kind == "jsonl":
            yield from _json_lines(piece.file, piece.start, piece.stop, piece.first)
        elif piece.kind == "parquet":
            yield from _parquet_rows(piece)
        elif piece.kind in ("datasets", "hub"):
            rows = _dataset(piece.file, piece.kind, piece.split)
            for row in range(piece.start, piece.stop):
                yield Record(piece.file, row, dict(rows[row]))
        else:
            yield from read_file(piece.file, piece.kind, piece.split)


def _parquet_rows(piece: Piece) -> Iterator[Record]:
    """Reads only the row groups that the piece touches."""
    with fsspec.open(piece.file, "rb") as stream:
        table = pq.ParquetFile(stream)
        first = 0
        for group in range(table.num_row_groups):
            count = table.metadata.row_group(group).num_rows
            if first < piece.stop and first + count > piece.start:
                row = first
                for batch in table.iter_batches(PIECE_ROWS, row_groups=[group]):
                    skipped = max(0, piece.start - row)
                    wanted = batch.slice(skipped, max(0, piece.stop - row - skipped))
                    for at, values in enumerate(wanted.to_pylist()):
                        yield Record(piece.file, row + skipped + at, values)
                    row += len(batch)
            first += count


def _json_lines(file: str, start: int, stop: int | None, first: int) -> Iterator[Record]:
    with cast(Any, fsspec.open(file, "rb")) as stream:
        stream.seek(start)
        position, line = start, first
        while stop is None or position < stop:
            raw = stream.readline()
            if not raw:
                break
            position += len(raw)
            if raw.strip():
                yield Record(file, line, _json_object(raw, file, line))
            line += 1


def _json_object(raw: bytes, file: str, line: int) -> dict[str, Any]:
    try:
        values = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}, line {line}: is no UTF-8 text ({error.reason}). Convert the file to UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}, line {line}: broken JSON ({error.msg} at column {error.colno}). Mend or remove the line."
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"{file}, line {line}: expected an object {{...}}, found {type(values).__name__}")
    return values


def _line_pieces(file: str) -> list[Piece]:
    out: list[Piece] = []
    with fsspec.open(file, "rb") as stream:
        start, line, position, first = 0, 1, 0, 1
        for raw in stream:
            position += len(raw)
            line += 1
            if position - start >= PIECE_BYTES or line - first >= PIECE_ROWS:
                out.append(Piece(file, "jsonl", "", start, position, first))
                start, first = position, line
        if position > start:
            out.append(Piece(file, "jsonl", "", start, position, first))
    return out


def _json(file: str) -> Iterator[Record]:
    """A JSON array of objects, an object of objects (the key becomes `_key`), or JSON lines under another name."""
    with cast(Any, fsspec.open(file, "rt", encoding="utf-8-sig")) as stream:
        text = stream.read()
    try:
        values = json.load(io.StringIO(text))
    except json.JSONDecodeError:
        yield from _json_lines(file, 0, None, 1)
        return
    if isinstance(values, dict) and values and all(isinstance(value, dict) for value in values.values()):
        values = [{"_key": key, **value} for key, value in values.items()]
    for row, value in enumerate(values if isinstance(values, list) else [values]):
        if not isinstance(value, dict):
            raise UserError(f"{file}, row {row}: expected an object {{...}}, found {type(value).__name__}")
        yield Record(file, row, value)


def _dataset(path: str, kind: Format, split: str) -> Any:
    import datasets

    try:
        if kind == "datasets":
            loaded = datasets.load_from_disk(path)
        else:
            name, _, subset = path.partition(":")
            loaded = datasets.load_dataset(name, subset or None)
    except Exception as error:  # the hub's client raises a dozen kinds
        raise UserError(
            f"{path}: no such file, and the hub does not give it ({_first_line(error)}). "
            "Check the path, the spelling, and the network."
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise UserError(f"{path}: has no split '{split}'; there are {', '.join(map(str, loaded))}")
        return loaded[split]
    return loaded


def _open_fs(path: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise UserError(f"{path}: this kind of path cannot be opened ({_first_line(error)})") from None


def _suffix(name: str) -> str:
    base = name.rsplit("/", 1)[-1].lower()
    return f".{base.rsplit('.', 1)[-1]}" if "." in base else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
