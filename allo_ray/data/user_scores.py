"""Rows that a user wants scored: a context and a response as text or as token ids, made SCORE_ROWS.

Rows that are the same in context and response are the same work: they share an id and are scored once. USER_ROWS says
under which id the score of every row of the source is found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from allo_ray import tables
from allo_ray.config.jobs import ScoreColumns
from allo_ray.data.lookup import BATCH_ROWS
from allo_ray.data.prepare import first_of_each
from allo_ray.data.reward_rows import SCORE_ROWS
from allo_ray.data.shard_index import hash_ids
from allo_ray.data.tokenise import Tokeniser
from allo_ray.engines.base import model_facts
from allo_ray.errors import UserError
from allo_ray.records import Record, records

#: The rows of the user's files in their order, each with the id of its score.
USER_ROWS = tables.Table(
    "user_rows",
    pa.schema(
        [pa.field("source", pa.string()), pa.field("row", pa.int64()), pa.field("id", pa.string())],
        metadata={"allo_ray.table": "user_rows", "allo_ray.version": str(tables.VERSION)},
    ),
)
_BOTH = pa.schema([*SCORE_ROWS.schema, *USER_ROWS.schema.remove(2)])


def write_user_rows(
    out: str | Path, source: str, columns: ScoreColumns, tokeniser: Tokeniser, policy: Tokeniser | None = None
) -> dict[str, int]:
    """Writes SCORE_ROWS to the file `out` and USER_ROWS to `rows.parquet` beside it.

    Where a policy is given, ids in the rows are its own, and the scoring model reads their text with its tokenizer.

    Returns:
        rows (of the source), repeated (the same as one further up).

    Raises:
        UserError: a row lacks a column, or holds what is no text and no token; its context is empty; two rows share an
            id and nothing else. Names file, row, column and remedy.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    unsorted = out.with_name(f".{out.name}.unsorted")
    ids: list[np.ndarray] = []
    contents: list[np.ndarray] = []
    made = _made(source, columns, tokeniser, policy)
    with pq.ParquetWriter(unsorted, _BOTH, compression="lz4") as writer:
        while chunk := list(islice(made, BATCH_ROWS)):
            ids.append(hash_ids([row["id"] for row, _ in chunk]))
            contents.append(hash_ids([content for _, content in chunk]))
            writer.write_table(pa.Table.from_pylist([row for row, _ in chunk], schema=_BOTH))
    if not ids:
        raise UserError(f"{source}: holds no rows. Check `rows`.")
    _check_ids(ids, contents, unsorted, columns)
    fresh, start = first_of_each(ids), 0
    part, listed = out.with_name(f".{out.name}.part"), out.with_name("rows.parquet")
    with (
        pq.ParquetWriter(part, SCORE_ROWS.schema, compression="zstd") as writer,
        pq.ParquetWriter(listed, USER_ROWS.schema, compression="zstd") as every,
    ):
        for batch in pq.ParquetFile(unsorted).iter_batches(BATCH_ROWS):
            block = pa.Table.from_batches([batch])
            first = pa.array(fresh[start : start + len(block)])
            start += len(block)
            every.write_table(block.select(USER_ROWS.schema.names).cast(USER_ROWS.schema))
            writer.write_table(block.filter(first).select(SCORE_ROWS.schema.names).cast(SCORE_ROWS.schema))
    part.rename(out)
    unsorted.unlink()
    return {"rows": len(fresh), "repeated": int((~fresh).sum())}


def user_responses(source: str, columns: ScoreColumns, policy: Tokeniser) -> Iterator[tuple[str, list[int]]]:
    """(id, the policy's token ids) of every response, as `write_user_rows` names them."""
    vocabulary = _vocabulary(policy)
    for record in records(source):
        context = _ids(record, columns.context, policy.prompt, vocabulary)
        response = _ids(record, columns.response, policy.plain, vocabulary)
        yield _name(record, columns, context, response), response


def _made(
    source: str, columns: ScoreColumns, tokeniser: Tokeniser, policy: Tokeniser | None
) -> Iterator[tuple[dict[str, Any], str]]:
    """(row of _BOTH, a hash of its content) for every row of the source."""
    own = policy or tokeniser
    foreign, vocabulary = not tokeniser.same_as(own), _vocabulary(own)
    for record in records(source):
        context = _ids(record, columns.context, own.prompt, vocabulary)
        if not context:
            raise UserError(f"{record.place}, field '{columns.context}': is empty; a context is needed.")
        response = _ids(record, columns.response, own.plain, vocabulary)
        name, content = _name(record, columns, context, response), tables.content_id(context, response)
        if foreign:
            context = tokeniser.prompt(own.text(context))
            response = tokeniser.response(own.text(response), end=response[-1:] == [own.eos])
        row = {"id": name, "context_ids": context, "response_ids": response}
        yield row | {"source": record.file, "row": record.row}, content


def _check_ids(ids: list[np.ndarray], contents: list[np.ndarray], rows: Path, columns: ScoreColumns) -> None:
    """Raises UserError where two rows share an id and differ."""
    content = np.concatenate(contents)
    _, first, group = np.unique(np.concatenate(ids), return_index=True, return_inverse=True)
    clashes = np.flatnonzero(content != content[first[group]])
    if not len(clashes):
        return
    later, earlier = int(clashes[0]), int(first[group[clashes[0]]])
    start, places = 0, {}
    for batch in pq.ParquetFile(rows).iter_batches(BATCH_ROWS, columns=["id", *USER_ROWS.schema.names[:2]]):
        for at in (earlier, later):
            if start <= at < start + len(batch):
                places[at] = batch.slice(at - start, 1).to_pylist()[0]
        start += len(batch)
    old, new = (Record(places[at]["source"], places[at]["row"], {}).place for at in (earlier, later))
    raise UserError(
        f"{new}, field '{columns.id}': '{places[later]['id']}' is the id of another context or response in {old} "
        f"({len(clashes)} such rows). Give every row an id of its own, or leave columns.id out: rows are then named "
        "by what they hold."
    )


def _vocabulary(tokeniser: Tokeniser) -> int:
    """How many token ids the tokenizer's model knows."""
    return int(model_facts(tokeniser.folder).get("vocab_size", len(tokeniser.hf)))


def _name(record: Record, columns: ScoreColumns, context: list[int], response: list[int]) -> str:
    if columns.id is None:
        return tables.content_id(context, response)
    given = str(_value(record, columns.id))
    if not given.strip():
        raise UserError(f"{record.place}, field '{columns.id}': is empty; every row needs an id of its own.")
    return given


def _ids(record: Record, column: str, tokenise: Callable[[str], list[int]], vocabulary: int) -> list[int]:
    """The column `<name>_ids` where the row has it, else the text's ids."""
    given = record.values.get(f"{column}_ids")
    if given is None:
        text = _value(record, column)
        if not isinstance(text, str | int | float):
            raise UserError(
                f"{record.place}, field '{column}': holds {type(text).__name__}; expected text. "
                f"Token ids belong into '{column}_ids'."
            )
        return tokenise(str(text))
    if not isinstance(given, list) or not all(type(one) is int and 0 <= one < vocabulary for one in given):
        raise UserError(
            f"{record.place}, field '{column}_ids': expected a list of token ids from 0 to {vocabulary - 1}. They "
            "must come from the tokenizer of `policy` where it is given, else of `model`."
        )
    return given


def _value(record: Record, column: str) -> Any:
    value = record.values.get(column)
    if value is None:
        found = ", ".join(f"'{name}'" for name in record.values) or "none"
        raise UserError(
            f"{record.place}, field '{column}': is missing or empty (found {found}); name yours under columns."
        )
    return value
