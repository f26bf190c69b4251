"""Rows that a batch job has prepared: a run that goes on takes them as they are, tens of millions of rows too."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def prepared_once(
    files: Sequence[Path], params: Mapping[str, Any], prepare: Callable[[], dict[str, int]]
) -> dict[str, int]:
    """Returns the counts of `prepare()`, which writes `files`; runs it only where they are not there yet, or were made
    with other parameters.

    `params`: JSON of all that decides the rows.
    """
    note = files[0].with_name("prepared.json")
    told = json.loads(json.dumps(dict(params)))
    if note.is_file():
        found = json.loads(note.read_text())
        if found["params"] == told and all(file.is_file() for file in files):
            return found["counts"]
        note.unlink()
    counts = prepare()
    part = note.with_name(f".{note.name}.part")
    part.write_text(json.dumps({"params": told, "counts": counts}, indent=1))
    part.rename(note)
    return counts
