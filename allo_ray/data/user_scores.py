"""Rows that a user wants scored: a context and a response as text or as token ids, made SCORE_ROWS.

Rows that are the same in context and response are the same work: they share an id and are scored once. USER_ROWS says
under which id the score of every row of the source is found. A large source is tokenised by Ray tasks, a piece each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from allo_ray import tables
from allo_ray.config.jobs import ScoreColumns
from allo_ray.data.lookup import BATCH_ROWS
from allo_ray.data.ordered_tasks import in_order
from allo_ray.data.prepare import PIECES_IN_PLACE, first_of_each
from allo_ray.data.reward_rows import SCORE_ROWS
from allo_ray.data.shard_index import hash_ids
from allo_ray.data.tokenise import Tokeniser
from allo_ray.engines.base import model_facts
from allo_ray.errors import UserError
from allo_ray.records import Piece, Record, find_files, pieces, read_piece

POLICY_FILE = "policy_rows.parquet"
#: The rows of the user's files in their order, each with the id of its score.
USER_ROWS = tables.Table(
    "user_rows",
    pa.schema(
        [pa.field("source", pa.string()), pa.field("row", pa.int64()), pa.field("id", pa.string())],
        metadata={"allo_ray.table": "user_rows", "allo_ray.version": str(tables.VERSION)},
    ),
)
#: The responses that are scored, as the policy's own tokens.
POLICY_ROWS = tables.Table(
    "policy_rows",
    pa.schema(
        [pa.field("id", pa.string()), pa.field("response_ids", pa.list_(pa.int32()))],
        metadata={"allo_ray.table": "policy_rows", "allo_ray.version": str(tables.VERSION)},
    ),
)
#: What is made of a row of the source, with a hash of what it holds.
_ALL = pa.schema(
    [
        *SCORE_ROWS.schema,
        POLICY_ROWS.schema.field("response_ids").with_name("policy_ids"),
        *USER_ROWS.schema.remove(2),
        pa.field("content", pa.string()),
    ]
)


def in_place(source: str) -> bool:
    """Is the source tokenised without Ray?"""
    return _without_ray(_pieces(source))


def write_user_rows(
    out: str | Path, source: str, columns: ScoreColumns, tokeniser: Tokeniser, policy: Tokeniser | None = None
) -> dict[str, int]:
    """Writes SCORE_ROWS to the file `out`, and USER_ROWS to `rows.parquet` beside it.

    Where a policy is given, ids in the rows are its own, the scoring model reads their text with its tokenizer, and
    POLICY_ROWS are written to `policy_rows.parquet`.

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
    with pq.ParquetWriter(unsorted, _ALL, compression="lz4") as writer:
        for block in _blocks(_Maker(columns, tokeniser, policy or tokeniser), _pieces(source)):
            ids.append(hash_ids(block.column("id").to_pylist()))
            contents.append(hash_ids(block.column("content").to_pylist()))
            writer.write_table(block)
    if not sum(map(len, ids)):
        raise UserError(f"{source}: holds no rows. Check `rows`.")
    _check_ids(ids, contents, unsorted, columns)
    fresh, start = first_of_each(ids), 0
    part = out.with_name(f".{out.name}.part")
    with ExitStack() as files:

        def write_to(file: Path, table: tables.Table) -> pq.ParquetWriter:
            return files.enter_context(pq.ParquetWriter(file, table.schema, compression="zstd"))

        writer, every = write_to(part, SCORE_ROWS), write_to(out.with_name("rows.parquet"), USER_ROWS)
        owned = write_to(out.with_name(POLICY_FILE), POLICY_ROWS) if policy is not None else None
        for batch in pq.ParquetFile(unsorted).iter_batches(BATCH_ROWS):
            block = pa.Table.from_batches([batch])
            first = block.filter(pa.array(fresh[start : start + len(block)]))
            start += len(block)
            every.write_table(block.select(USER_ROWS.schema.names).cast(USER_ROWS.schema))
            writer.write_table(first.select(SCORE_ROWS.schema.names).cast(SCORE_ROWS.schema))
            if owned is not None:
                own = first.select(["id", "policy_ids"]).rename_columns(POLICY_ROWS.schema.names)
                owned.write_table(own.cast(POLICY_ROWS.schema))
    part.rename(out)
    unsorted.unlink()
    return {"rows": len(fresh), "repeated": int((~fresh).sum())}


def _pieces(source: str) -> list[Piece]:
    return [piece for file, kind in find_files(source) for piece in pieces(file, kind)]


def _without_ray(found: Sequence[Piece]) -> bool:
    """A few pieces, and files that cannot be cut, which a task would hold whole, are read in place."""
    return len(found) <= PIECES_IN_PLACE or any(piece.stop < 0 for piece in found)


def _blocks(make: _Maker, found: Sequence[Piece]) -> Iterator[pa.Table]:
    """Rows of _ALL in the source's order."""
    if not _without_ray(found):
        yield from in_order(make, found)
        return
    for piece in found:
        rows = read_piece(piece)
        while chunk := list(islice(rows, BATCH_ROWS)):
            yield make.table(chunk)


class _Maker:
    """Turns records into rows of _ALL. `own` reads them, `tokeniser` is the scoring model's."""

    def __init__(self, columns: ScoreColumns, tokeniser: Tokeniser, own: Tokeniser) -> None:
        self.columns, self.tokeniser, self.own = columns, tokeniser, own
        self.foreign = not tokeniser.same_as(own)
        #: How many token ids the model of the rows knows.
        self.vocabulary = int(model_facts(own.folder).get("vocab_size", len(own.hf)))

    def __call__(self, piece: Piece) -> pa.Table:
        return self.table(read_piece(piece))

    def table(self, found: Iterable[Record]) -> pa.Table:
        return pa.Table.from_pylist([self._row(record) for record in found], schema=_ALL)

    def _row(self, record: Record) -> dict[str, Any]:
        context = _ids(record, self.columns.context, self.own.prompt, self.vocabulary)
        if not context:
            raise UserError(f"{record.place}, field '{self.columns.context}': is empty; a context is needed.")
        response = policy_ids = _ids(record, self.columns.response, self.own.plain, self.vocabulary)
        name, content = _name(record, self.columns, context, response), tables.content_id(context, response)
        if self.foreign:
            context = self.tokeniser.prompt(self.own.text(context))
            ended = response[-1:] == [self.own.eos]
            response = self.tokeniser.response(self.own.text(response), end=ended)
        return {
            "id": name,
            "context_ids": context,
            "response_ids": response,
            "policy_ids": policy_ids,
            "source": record.file,
            "row": record.row,
            "content": content,
        }


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
