"""The user's rows: where they are, and what is wrong with them, found before any worker starts.

A row becomes an `Example`: the question (text or conversation) with a reference, or with two responses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import fsspec

from allo_ray.config.data import Columns, DataConfig
from allo_ray.data.templates import Messages
from allo_ray.errors import UserError
from allo_ray.records import Piece, Record, find_files, pieces, read_file, read_piece
from allo_ray.tables import content_id
from evals.suites.registry import build_suite

SUITE = "suite:"
#: Files up to this size are hashed whole; of larger ones the size, the time and three stretches.
HASHED_WHOLE = 256 << 20
STRETCH = 1 << 20


@dataclass(frozen=True)
class Example:
    """One row of the user's. `prompt` is a question, or a conversation that ends before the response."""

    source: str
    row: int
    prompt: str | Messages
    reference: str | None = None
    answer: str | None = None
    chosen: str = ""
    rejected: str = ""

    @property
    def question(self) -> str:
        """The prompt as text; turns of a conversation are joined by line breaks."""
        return (
            self.prompt
            if isinstance(self.prompt, str)
            else "\n".join(turn["content"] for turn in self.prompt)
        )


def check_source(config: DataConfig, needs_reference: bool = True) -> int:
    """Reads every row once and returns how many there are.

    Raises:
        UserError: the first thing that is wrong, with file, row, field and remedy.
    """
    count = 0
    for _ in examples(config, needs_reference):
        count += 1
    if count == 0:
        raise UserError(f"{config.path}: holds no rows. Check data.path, data.split and data.limit.")
    return count


def examples(config: DataConfig, needs_reference: bool = True) -> Iterator[Example]:
    """Yields the rows of a source in its own order, at most `limit`; see `check_source` for what it raises."""
    return islice(_all(config, needs_reference), config.limit)


def _all(config: DataConfig, needs_reference: bool) -> Iterator[Example]:
    if config.path.startswith(SUITE):
        yield from _suite(config)
        return
    for file, kind in find_files(config.path, config.format, config.split):
        for record in read_file(file, kind, config.split):
            yield example(record, config, needs_reference)


def source_pieces(config: DataConfig) -> list[Piece]:
    """Stretches of the source that can be read apart, in order, at most about a megabyte-scale batch each."""
    out: list[Piece] = []
    for file, kind in find_files(config.path, config.format, config.split):
        out.extend(pieces(file, kind, config.split))
    return out


def piece_examples(piece: Piece, config: DataConfig, needs_reference: bool = True) -> Iterator[Example]:
    """The rows of one piece."""
    for record in read_piece(piece):
        yield example(record, config, needs_reference)


def fingerprint(config: DataConfig) -> str:
    """A hash of the source's content, so that changed data is other data under the same path.

    Raises:
        UserError: there is nothing at the path.
    """
    if config.path.startswith(SUITE):
        return content_id(
            *(part for one in examples(config) for part in (one.prompt, one.reference, one.answer))
        )
    return content_of(config.path, config.format, config.split)


def content_of(path: str, kind: str = "auto", split: str = "train") -> str:
    """As `fingerprint`, of any files."""
    digest = hashlib.blake2b(digest_size=8)
    for file, told in find_files(path, kind, split):
        if told == "hub":
            digest.update(f"hub {path}".encode())
            continue
        files, root = fsspec.core.url_to_fs(file)
        for name in sorted(files.find(root)) if files.isdir(root) else [root]:
            size = files.size(name)
            digest.update(f"{name.rsplit('/', 1)[-1]} {size}".encode())
            if size > HASHED_WHOLE:
                digest.update(str(files.modified(name)).encode())
            with files.open(name, "rb") as stream:
                starts = range(0, size, STRETCH) if size <= HASHED_WHOLE else (0, size // 2, size - STRETCH)
                for start in starts:
                    stream.seek(start)
                    digest.update(stream.read(STRETCH))
    return digest.hexdigest()


def _suite(config: DataConfig) -> Iterator[Example]:
    name = config.path.removeprefix(SUITE)
    if config.kind != "prompts":
        raise UserError(f"data.path: {config.path} gives prompts; set data.kind to prompts")
    args = {key: value for key, value in config.args.items() if key != "path"}
    for row, item in enumerate(build_suite(name, config.args.get("path"), args).rows(config.split)):
        if not item["prompt"].strip():
            raise UserError(f"{config.path}, row {row}: the prompt is empty")
        yield Example(config.path, row, item["prompt"], item["reference"], item["answer"])


def example(record: Record, config: DataConfig, needs_reference: bool = True) -> Example:
    """Checks one row and takes its fields out of the user's columns.

    Raises:
        UserError: a column is missing, a field is empty or of the wrong kind, or chosen equals rejected.
    """
    columns = config.columns
    if config.kind == "pairs":
        return _pair(record, columns)
    prompt = _prompt(record, columns.prompt)
    reference = _optional_text(record, columns.reference)
    answer = _optional_text(record, columns.answer) if columns.answer else None
    if needs_reference and reference is None and answer is None:
        named = f"'{columns.reference}'" + (f" or '{columns.answer}'" if columns.answer else "")
        raise _wrong(
            record, columns.reference, f"is missing or empty; a prompt needs {named} to verify its samples"
        )
    return Example(record.file, record.row, prompt, reference, answer)


def _pair(record: Record, columns: Columns) -> Example:
    chosen_turns, chosen = _response(record, columns.chosen)
    rejected_turns, rejected = _response(record, columns.rejected)
    if chosen_turns != rejected_turns:
        raise _wrong(
            record, columns.rejected, "does not continue the same conversation as the chosen response"
        )
    if record.values.get(columns.prompt) is None and chosen_turns:
        prompt: str | Messages = chosen_turns
    else:
        prompt = _prompt(record, columns.prompt)
        if chosen_turns:
            before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            prompt = chosen_turns if chosen_turns[: len(before)] == before else [*before, *chosen_turns]
    if chosen.strip() == rejected.strip():
        raise _wrong(record, columns.rejected, "equals the chosen response; remove the row")
    if not isinstance(prompt, str) and len(prompt) == 1 and prompt[0]["role"] == "user":
        prompt = prompt[0]["content"]
    return Example(
        record.file, record.row, prompt, _optional_text(record, columns.reference), None, chosen, rejected
    )


def _prompt(record: Record, column: str) -> str | Messages:
    value = _field(record, column)
    if isinstance(value, str):
        if not value.strip():
            raise _wrong(record, column, "is empty; fill it or remove the row")
        return value
    turns = _turns(record, column, value)
    return turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "user" else turns


def _response(record: Record, column: str) -> tuple[Messages, str]:
    """(turns before the response, the response)."""
    value = _field(record, column)
    turns: Messages = []
    if not isinstance(value, str):
        turns = _turns(record, column, value)
        if turns[-1]["role"] != "assistant":
            raise _wrong(
                record, column, f"ends with the role '{turns[-1]['role']}'; the last turn is the assistant's"
            )
        value, turns = turns[-1]["content"], turns[:-1]
    if not value.strip():
        raise _wrong(record, column, "is empty; fill it or remove the row")
    return turns, value


def _turns(record: Record, column: str, value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        raise _wrong(record, column, f"holds {_kind(value)}; expected text or a list of {{role, content}}")
    turns: Messages = []
    for turn in value:
        role = turn.get("role") if isinstance(turn, Mapping) else None
        content = turn.get("content") if isinstance(turn, Mapping) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise _wrong(record, column, "holds a turn without the texts 'role' and 'content'")
        turns.append({"role": role, "content": content})
    return turns


def _field(record: Record, column: str) -> Any:
    if column not in record.values:
        found = ", ".join(f"'{name}'" for name in record.values) or "none"
        raise _wrong(record, column, f"is no column here (found {found}); name yours under data.columns")
    value = record.values[column]
    if value is None:
        raise _wrong(record, column, "is empty; fill it or remove the row")
    return value


def _optional_text(record: Record, column: str) -> str | None:
    value = record.values.get(column)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = repr(value)
    if value is not None and not isinstance(value, str):
        raise _wrong(record, column, f"holds {_kind(value)}; expected text")
    return value if value is not None and value.strip() else None


def _kind(value: Any) -> str:
    return "an empty list" if value == [] else type(value).__name__


def _wrong(record: Record, column: str, what: str) -> UserError:
    return UserError(f"{record.place}, field '{column}': {what}.")
