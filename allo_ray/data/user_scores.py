"""Rows that a user wants scored: a context and a response as text or as token ids, made SCORE_ROWS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from allo_ray import tables
from allo_ray.config.jobs import ScoreColumns
from allo_ray.data.lookup import write_stream
from allo_ray.data.reward_rows import SCORE_ROWS
from allo_ray.data.tokenise import Tokeniser
from allo_ray.errors import UserError
from allo_ray.records import Record, records


def write_user_rows(out: str | Path, source: str, columns: ScoreColumns, tokeniser: Tokeniser) -> int:
    """Writes SCORE_ROWS to the file `out` and returns how many there are.

    Raises:
        UserError: a row lacks a column, or its context is empty; names file, row and column.
    """

    def rows() -> Iterator[dict[str, Any]]:
        for record in records(source):
            context = _ids(record, columns.context, tokeniser.prompt)
            response = _ids(record, columns.response, tokeniser.plain)
            if not context:
                raise UserError(f"{record.place}, field '{columns.context}': is empty; a context is needed.")
            name = (
                tables.content_id(context, response)
                if columns.id is None
                else str(_value(record, columns.id))
            )
            yield {"id": name, "context_ids": context, "response_ids": response}

    return write_stream(SCORE_ROWS, rows(), Path(out))


def _ids(record: Record, column: str, tokenise: Any) -> list[int]:
    """The column `<name>_ids` where the row has it, else the text's ids."""
    given = record.values.get(f"{column}_ids")
    return list(given) if given is not None else tokenise(str(_value(record, column)))


def _value(record: Record, column: str) -> Any:
    value = record.values.get(column)
    if value is None:
        found = ", ".join(f"'{name}'" for name in record.values) or "none"
        raise UserError(
            f"{record.place}, field '{column}': is missing or empty (found {found}); name yours under columns."
        )
    return value
