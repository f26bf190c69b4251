"""Shared by the suites that read an official file: reading it, and saying which field is not as it should be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from allo_ray.errors import UserError
from allo_ray.records import Record, records


def rows_of(path: str, split: str, suite: str) -> Iterator[Record]:
    """The rows of an official file; of a folder whose files are named by split, those of `split` alone.

    Raises:
        UserError: nothing is there, or there are no rows.
    """
    count = 0
    for record in records(path, split=split):
        if _other_split(record.file, split):
            continue
        count += 1
        yield record
    if count == 0:
        raise UserError(f"suite {suite}: {path} holds no rows for the split '{split}'")


def take(record: Record, suite: str, *names: str) -> Any:
    """The first of the fields `names` that a row has; `a.b` looks inside `a`.

    Raises:
        UserError: the row has none of them.
    """
    for name in names:
        value: Any = record.values
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return value
    raise UserError(
        f"{record.place}: a row of {suite} needs the field {' or '.join(repr(name) for name in names)}; "
        f"found {', '.join(record.values)}. Is this the official file?"
    )


_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev", "val"), "test": ("test",)}


def _other_split(file: str, split: str) -> bool:
    """True for `.../train.jsonl` when `test` is asked for: the file's name says another split than this one."""
    name = file.rsplit("/", 1)[-1].lower()
    mine = next((words for words in _SPLITS.values() if split in words), (split,))
    others = [
        word
        for words in _SPLITS.values()
        if words != mine
        for word in words
        if len(word) > 3 or word == "dev"
    ]
    return any(word in name for word in others) and not any(word in name for word in mine)
