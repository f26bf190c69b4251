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


def write_user_rows(
    out: str | Path, source: str, columns: ScoreColumns, tokeniser: Tokeniser, policy: Tokeniser | None = None
) -> int:
    """Writes SCORE_ROWS to the file `out` and returns how many there are.

    Where a policy is given, ids in the rows are its own, and the scoring model reads their text with its tokenizer.

    Raises:
        UserError: a row lacks a column, or its context is empty; names file, row and column.
    """
    own = policy or tokeniser
    foreign = not tokeniser.same_as(own)

    def rows() -> Iterator[dict[str, Any]]:
        for record in records(source):
            context = _ids(record, columns.context, own.prompt)
            if not context:
                raise UserError(f"{record.place}, field '{columns.context}': is empty; a context is needed.")
            name, response = _response(record, columns, context, own)
            if foreign:
                context = tokeniser.prompt(own.text(context))
                response = tokeniser.response(own.text(response), end=response[-1:] == [own.eos])
            yield {"id": name, "context_ids": context, "response_ids": response}

    return write_stream(SCORE_ROWS, rows(), Path(out))


def user_responses(source: str, columns: ScoreColumns, policy: Tokeniser) -> Iterator[tuple[str, list[int]]]:
    """(id, the policy's token ids) of every response, as `write_user_rows` names them."""
    for record in records(source):
        yield _response(record, columns, _ids(record, columns.context, policy.prompt), policy)


def _response(
    record: Record, columns: ScoreColumns, context: list[int], policy: Tokeniser
) -> tuple[str, list[int]]:
    response = _ids(record, columns.response, policy.plain)
    given = None if columns.id is None else str(_value(record, columns.id))
    return given or tables.content_id(context, response), response


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
