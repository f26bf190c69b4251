"""Shared by the suites that read an official file: reading it, and saying which field is not as it should be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from allo_ray.errors import UserError
from allo_ray.records import Record, records


def rows_of(path: str, split: str, suite: str) -> Iterator[Record]:
    """The rows of an official file; of a folder whose files or folders are named by split, those of `split` alone.

    Raises:
        UserError: nothing is there, or there are no rows.
    """
    count = 0
    for record in records(path, split=split):
        if _other_split(record.file.removeprefix(path), split):
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


_SPLITS = ({"train", "training"}, {"validation", "valid", "val", "dev"}, {"test", "testing"})


def _other_split(place: str, split: str) -> bool:
    """True for `.../train.jsonl` where `test` is asked for: the words of the place name another split alone."""
    words = set(re.split(r"[^a-z]+", place.lower()))
    mine = next((names for names in _SPLITS if split in names), {split})
    return not words & mine and any(words & names for names in _SPLITS if names is not mine)
