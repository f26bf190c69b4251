"""The tables that stages exchange: one pyarrow schema each, with name and version in its metadata.

A table is a Parquet file, or a folder of Parquet files (shards). Ids are content hashes, so the same
row has the same id in every run. Log-probs are natural logarithms (nats) in float32, one per response
token, in the order of the response's own token ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from allo_ray.errors import UserError

VERSION = 1


def content_id(*parts: object) -> str:
    """Returns 16 hexadecimal digits that depend on every part and on where one ends."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = str(part).encode()
        digest.update(len(text).to_bytes(8, "little"))
        digest.update(text)
    return digest.hexdigest()


@dataclass(frozen=True)
class Table:
    """A named schema with the means to read and write it."""

    name: str
    schema: pa.Schema

    def build(self, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
        """Makes a table of `rows`; a missing column or a wrong type is an error of ours, not the user's."""
        return pa.Table.from_pylist([dict(row) for row in rows], schema=self.schema)

    def write(self, rows: pa.Table | Iterable[Mapping[str, Any]], path: str | Path) -> pa.Table:
        """Writes one Parquet file at `path` (its folder is made) and returns what was written."""
        table: pa.Table = rows if isinstance(rows, pa.Table) else self.build(rows)
        table = (
            table.select(self.schema.names).cast(self.schema).replace_schema_metadata(self.schema.metadata)
        )
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, compression="zstd")
        return table

    def read(self, path: str | Path) -> pa.Table:
        """Reads a file, or a folder of shards in the order of their names.

        Raises:
            UserError: nothing is there, or it is another table or another version.
        """
        files = self.files(path)
        if not files:
            raise UserError(
                f"{path}: no {self.name} table here. Check the path, or run the stage that makes it."
            )
        for file in files:
            self.check(pq.read_schema(file), file)
        return pa.concat_tables([pq.read_table(file, schema=self.schema) for file in files])

    def files(self, path: str | Path) -> list[Path]:
        """The Parquet files of a table, in the order in which its rows count."""
        path = Path(path)
        return sorted(path.rglob("*.parquet")) if path.is_dir() else [path] if path.exists() else []

    def check(self, schema: pa.Schema, where: str | Path) -> None:
        """Raises UserError unless `schema` is this table's, in this version."""
        told = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        if told.get("allo_ray.table") != self.name or told.get("allo_ray.version") != str(VERSION):
            raise UserError(
                f"{where}: expected the table '{self.name}' in version {VERSION}, found "
                f"'{told.get('allo_ray.table', 'a foreign file')}' in version "
                f"{told.get('allo_ray.version', 'none')}. Use a new store, or the program version that wrote this one."
            )


def _table(name: str, **columns: pa.DataType) -> Table:
    metadata = {"allo_ray.table": name, "allo_ray.version": str(VERSION)}
    return Table(
        name, pa.schema([pa.field(column, kind) for column, kind in columns.items()], metadata=metadata)
    )


_TEXT, _FLAG, _IDS, _FLOATS = pa.string(), pa.bool_(), pa.list_(pa.int32()), pa.list_(pa.float32())
_INT, _LONG, _REAL = pa.int32(), pa.int64(), pa.float64()

#: A prompt as the user gave it, as the model reads it, and what is known of its answer.
PROMPTS = _table(
    "prompts", id=_TEXT, prompt=_TEXT, text=_TEXT, prompt_ids=_IDS, reference=_TEXT, answer=_TEXT, group=_TEXT
)
#: One sampled response; `verdict` is null where nothing could be verified.
SAMPLES = _table(
    "samples",
    id=_TEXT,
    prompt_id=_TEXT,
    index=_INT,
    seed=_LONG,
    text=_TEXT,
    response_ids=_IDS,
    finish_reason=_TEXT,
    answer=_TEXT,
    verdict=_FLAG,
)
#: A preference pair (x, y+, y-); sources are "human" or "sample".
PAIRS = _table(
    "pairs",
    id=_TEXT,
    prompt_id=_TEXT,
    prompt=_TEXT,
    text=_TEXT,
    reference=_TEXT,
    chosen=_TEXT,
    rejected=_TEXT,
    prompt_ids=_IDS,
    chosen_ids=_IDS,
    rejected_ids=_IDS,
    chosen_source=_TEXT,
    rejected_source=_TEXT,
)
#: Log-probs of a pair's two responses under one model, per token.
LOGPROBS = _table("logprobs", id=_TEXT, chosen=_FLOATS, rejected=_FLOATS)
#: A negative rewritten by the teacher with the fewest edits (paper 4.2), with the reward model's context.
REWRITES = _table(
    "rewrites",
    id=_TEXT,
    prediction=_TEXT,
    rewrite=_TEXT,
    rewrite_ids=_IDS,
    context=_TEXT,
    context_ids=_IDS,
    edits=_INT,
    teacher=_TEXT,
)
#: P_re of Eq. 5 for every token of a pair's rejected response.
TOKEN_SCORES = _table("token_scores", id=_TEXT, p_re=_FLOATS)
#: A prompt with one response, for supervised training.
SEQUENCES = _table("sequences", id=_TEXT, prompt_ids=_IDS, response_ids=_IDS)
#: What the training loop reads, in the order in which it reads it; unused columns hold empty lists.
TRAIN_ROWS = _table(
    "train_rows",
    position=_LONG,
    id=_TEXT,
    prompt_ids=_IDS,
    chosen_ids=_IDS,
    rejected_ids=_IDS,
    chosen_reference=_FLOATS,
    rejected_reference=_FLOATS,
    rejected_weight=_FLOATS,
)
#: Which tokens of a rejected response the learning loss kept (q of Eq. 8) under the last policy, with their log-ratios.
KEPT = _table("kept", id=_TEXT, q=_FLOATS, logratio=_FLOATS)
#: One answered evaluation question.
EVALS = _table(
    "evals", suite=_TEXT, id=_TEXT, prompt=_TEXT, response=_TEXT, answer=_TEXT, reference=_TEXT, correct=_FLAG
)
#: One optimiser step; what a method does not have is null. Tokens are those of all workers. Peaks are bytes, the most
#: that any worker has held so far: resident in main memory, and allocated on its GPU (null without one).
METRICS = _table(
    "metrics",
    step=_INT,
    loss=_REAL,
    lr=_REAL,
    grad_norm=_REAL,
    chosen_logratio=_REAL,
    rejected_logratio=_REAL,
    margin=_REAL,
    accuracy=_REAL,
    kept=_REAL,
    tokens=_LONG,
    seconds=_REAL,
    tokens_per_second=_REAL,
    peak_rss=_LONG,
    peak_gpu=_LONG,
)
#: A row that a rule removed, and why.
DROPS = _table("drops", source=_TEXT, row=_LONG, field=_TEXT, reason=_TEXT, excerpt=_TEXT)


def trials(columns: Mapping[str, pa.DataType]) -> Table:
    """A campaign's trials: what all campaigns have, and a column for each parameter and metric of this one."""
    return _table("trials", number=_INT, state=_TEXT, broke=_FLAG, seconds=_REAL, error=_TEXT, **columns)
