"""From the user's rows to the tables PROMPTS and PAIRS: rendered, tokenised, with ids; rule-breakers listed in DROPS.

Ray Data reads and tokenises the pieces of the source in parallel and hands them over in order; a source of few pieces
is read in place, one piece at a time. The driver holds the rows under way and 12 bytes for every row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from allo_ray import tables
from allo_ray.config.data import DataConfig, VerifyConfig
from allo_ray.data.lookup import BATCH_ROWS
from allo_ray.data.shard_index import hash_ids
from allo_ray.data.sources import SUITE, Example, examples, piece_examples, source_pieces
from allo_ray.data.task_errors import users_error
from allo_ray.data.templates import render
from allo_ray.data.tokenise import Tokeniser
from allo_ray.data.verify import Verifier
from allo_ray.errors import UserError
from allo_ray.records import Piece

EXCERPT_CHARACTERS = 80
#: A source of no more pieces than this (some 30,000 rows) is done before Ray workers have loaded their tokenizers.
PIECES_IN_PLACE = 16
#: Counts that say what was removed.
DROPPED_ROWS = {
    "broke_a_rule": "rows too long, or with special tokens only",
    "duplicates": "rows that stand further up too",
}
#: What travels beside a row: where it came from and, if a rule removed it, which one.
_BESIDE = tables.DROPS.schema


def prepare_prompts(
    config: DataConfig,
    tokeniser: Tokeniser,
    out: str | Path,
    drops: str | Path,
    *,
    verify: VerifyConfig | None = None,
    needs_reference: bool = True,
) -> dict[str, int]:
    """Writes PROMPTS to the file `out` and DROPS to the file `drops`; returns the counts of both.

    `verify` says how a short answer is taken from a reference where the source has none.

    Raises:
        UserError: as `check_source`; or more than `max_dropped` of the rows were dropped.
    """
    work = _Work(config, tokeniser, tables.PROMPTS, verify, needs_reference)
    return _prepare(work, Path(out), Path(drops))


def prepare_pairs(
    config: DataConfig, tokeniser: Tokeniser, out: str | Path, drops: str | Path
) -> dict[str, int]:
    """Writes PAIRS to the file `out` and DROPS to the file `drops`; see `prepare_prompts`."""
    return _prepare(_Work(config, tokeniser, tables.PAIRS, None, False), Path(out), Path(drops))


class _Work:
    """Turns examples into table rows."""

    def __init__(
        self,
        config: DataConfig,
        tokeniser: Tokeniser,
        table: tables.Table,
        verify: VerifyConfig | None,
        needs_reference: bool,
    ) -> None:
        self.config, self.table, self.needs_reference = config, table, needs_reference
        self._tokeniser, self._verify = tokeniser, verify
        beside = [field.with_name(f"_{field.name}") for field in _BESIDE]
        self.schema = pa.schema([*table.schema, *beside])

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Pieces of the source, as rows of `schema`."""
        found = [Piece(**row) for row in batch.to_pylist()]
        return self.build(
            one for piece in found for one in piece_examples(piece, self.config, self.needs_reference)
        )

    def build(self, found: Iterable[Example]) -> pa.Table:
        """Examples as rows of `schema`: the table's columns are null where a rule removed the row."""
        verifier = Verifier(self._verify) if self._verify is not None else None
        rows = []
        for one in found:
            row = self._row(one, self._tokeniser, verifier)
            beside = {
                "_source": one.source,
                "_row": one.row,
                "_field": None,
                "_reason": None,
                "_excerpt": None,
            }
            if isinstance(row, tuple):
                field, beside["_reason"] = row
                beside["_field"] = field
                told = one.question if field == "prompt" else getattr(one, field)
                beside["_excerpt"] = excerpt(told)
                row = dict.fromkeys(self.table.schema.names)
            rows.append(row | beside)
        return pa.Table.from_pylist(rows, schema=self.schema)

    def _row(
        self, one: Example, tokeniser: Tokeniser, verifier: Verifier | None
    ) -> dict[str, Any] | tuple[str, str]:
        """A row of the table, or (field, reason) of a drop."""
        config = self.config
        text = render(config.template, one.prompt, tokeniser.hf)
        prompt_ids = tokeniser.prompt(text)
        if tokeniser.only_special(prompt_ids):
            return "prompt", "it holds only special tokens"
        if len(prompt_ids) > config.max_prompt_tokens:
            return "prompt", f"{len(prompt_ids)} tokens; data.max_prompt_tokens is {config.max_prompt_tokens}"
        prompt_id = tables.content_id("prompt", text)
        if self.table.name == tables.PROMPTS.name:
            answer = one.answer
            if answer is None and one.reference is not None and verifier is not None:
                answer = verifier.gold(one.reference)
            return {
                "id": prompt_id,
                "prompt": one.question,
                "text": text,
                "prompt_ids": prompt_ids,
                "reference": one.reference,
                "answer": answer,
                "group": None,
            }
        chosen_ids, rejected_ids = tokeniser.response(one.chosen), tokeniser.response(one.rejected)
        length = len(prompt_ids) + max(len(chosen_ids), len(rejected_ids))
        if length > config.max_tokens:
            longer = "chosen" if len(chosen_ids) >= len(rejected_ids) else "rejected"
            return longer, f"{length} tokens with the prompt; data.max_tokens is {config.max_tokens}"
        return {
            "id": tables.content_id(prompt_id, one.chosen, one.rejected),
            "prompt_id": prompt_id,
            "prompt": one.question,
            "text": text,
            "reference": one.reference,
            "chosen": one.chosen,
            "rejected": one.rejected,
            "prompt_ids": prompt_ids,
            "chosen_ids": chosen_ids,
            "rejected_ids": rejected_ids,
            "chosen_source": "human",
            "rejected_source": "human",
        }


def in_place(config: DataConfig) -> bool:
    """Is the source so small that it is read without Ray?"""
    return config.path.startswith(SUITE) or len(source_pieces(config)) <= PIECES_IN_PLACE


def _prepare(work: _Work, out: Path, drops: Path) -> dict[str, int]:
    """Two passes: rows to a work file with the ids noted, then all but the repeated ones to `out`."""
    config, unsorted = work.config, out.with_name(f".{out.name}.unsorted")
    out.parent.mkdir(parents=True, exist_ok=True)
    hashes: list[np.ndarray] = []
    counts: Counter[str] = Counter()
    with _Dropped(drops) as dropped:
        with pq.ParquetWriter(unsorted, work.schema, compression="lz4") as writer:
            for block in _blocks(work):
                block = block.slice(0, None if config.limit is None else config.limit - counts["rows"])
                counts["rows"] += len(block)
                good = block.column("_reason").is_null()
                removed, kept = block.filter(block.column("_reason").is_valid()), block.filter(good)
                counts["broke_a_rule"] += len(removed)
                dropped.add(removed)
                hashes.append(hash_ids(kept.column("id").to_pylist()))
                writer.write_table(kept)
                if counts["rows"] == config.limit:
                    break
        fresh = first_of_each(hashes)
        part = out.with_name(f".{out.name}.part")
        start = 0
        with pq.ParquetWriter(part, work.table.schema, compression="zstd") as writer:
            for batch in pq.ParquetFile(unsorted).iter_batches(BATCH_ROWS):
                block = pa.Table.from_batches([batch])
                first = fresh[start : start + len(block)]
                start += len(block)
                repeated = block.filter(pa.array(~first))
                counts["duplicates"] += len(repeated)
                dropped.add(repeated, field="id", reason="the same row stands further up")
                writer.write_table(
                    block.filter(pa.array(first)).select(work.table.schema.names).cast(work.table.schema)
                )
    part.rename(out)
    unsorted.unlink()
    counts["kept"] = counts["rows"] - dropped.count
    _stop_if_too_many(config, counts, dropped.first, drops)
    return dict(counts)


class _Dropped:
    """The file DROPS under way; holds the first row and the number of rows."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self.first: dict[str, Any] | None = None
        self._writer = pq.ParquetWriter(path, _BESIDE, compression="zstd")

    def add(self, block: pa.Table, **told: str) -> None:
        """Adds the rows of a block; `told` says why where the rows do not say it themselves."""
        rows = [{name: row[f"_{name}"] for name in _BESIDE.names} | told for row in block.to_pylist()]
        if rows:
            self.first = self.first or rows[0]
            self.count += len(rows)
            self._writer.write_table(pa.Table.from_pylist(rows, schema=_BESIDE))

    def __enter__(self) -> _Dropped:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()


def _blocks(work: _Work) -> Iterator[pa.Table]:
    """The rows of the whole source in its order, a piece at a time."""
    config = work.config
    if config.path.startswith(SUITE):
        yield work.build(examples(config, work.needs_reference))
        return
    pieces = source_pieces(config)
    if len(pieces) <= PIECES_IN_PLACE:
        for piece in pieces:
            yield work.build(piece_examples(piece, config, work.needs_reference))
        return
    rows = ray.data.from_items([asdict(piece) for piece in pieces], override_num_blocks=len(pieces))
    rows = rows.map_batches(work, batch_size=1, batch_format="pyarrow")
    rows.context.execution_options.preserve_order = True
    rows.context.enable_progress_bars = False
    with users_error(rows):
        yield from rows.iter_batches(batch_size=None, batch_format="pyarrow")  # type: ignore[misc]


def excerpt(text: str) -> str:
    """How a dropped row begins, in one line."""
    return " ".join(text[:EXCERPT_CHARACTERS].split())


def first_of_each(hashes: Sequence[np.ndarray]) -> np.ndarray:
    """bool [N]: is a row the first with its id?"""
    whole = np.concatenate([hash_ids([]), *hashes])
    fresh = np.zeros(len(whole), dtype=bool)
    fresh[np.unique(whole, return_index=True)[1]] = True
    return fresh


def _stop_if_too_many(
    config: DataConfig, counts: Counter[str], first: dict[str, Any] | None, drops: Path
) -> None:
    dropped = counts["rows"] - counts["kept"]
    if counts["kept"] > 0 and dropped <= config.max_dropped * counts["rows"]:
        return
    if first is None:
        raise UserError(f"{config.path}: holds no rows. Check data.path, data.split and data.limit.")
    raise UserError(
        f"{config.path}: {dropped} of {counts['rows']} rows were dropped ({counts['broke_a_rule']} by the length "
        f"rules, {counts['duplicates']} repeated), more than data.max_dropped = {config.max_dropped:g} allows. The "
        f"first: {first['source']}, row {first['row']}, field '{first['field']}': {first['reason']}. "
        f"All are listed in {drops}. Raise data.max_tokens, mend the rows, or raise data.max_dropped."
    )
