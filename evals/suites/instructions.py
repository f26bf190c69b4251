"""Instructions without a right answer, whose responses a judge compares: AlpacaEval 2.0 and Arena-Hard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from allo_ray.errors import UserError
from evals.suites.base import Item
from evals.suites.official import rows_of, take


@dataclass(frozen=True)
class AlpacaEval:
    """805 instructions (Li et al., 2023): alpaca_eval.json; `output` is the official baseline's answer."""

    name: ClassVar[str] = "alpaca_eval"
    verifier: ClassVar[str] = "judge"
    path: str

    def rows(self, split: str) -> Iterator[Item]:
        """Fields: instruction, output."""
        for record in rows_of(self.path, split, self.name):
            output = record.values.get("output")
            yield Item(prompt=str(take(record, self.name, "instruction")), reference=output, answer=None)


@dataclass(frozen=True)
class ArenaHard:
    """500 hard prompts (Li et al., 2024): question.jsonl, of which the first user turn is asked."""

    name: ClassVar[str] = "arena_hard"
    verifier: ClassVar[str] = "judge"
    path: str

    def rows(self, split: str) -> Iterator[Item]:
        """Fields: turns (a list of {content}), or prompt."""
        for record in rows_of(self.path, split, self.name):
            turns = take(record, self.name, "turns", "prompt")
            if isinstance(turns, list):
                if not turns:
                    raise UserError(f"{record.place}, field 'turns': is empty")
                turns = turns[0]["content"] if isinstance(turns[0], dict) else turns[0]
            yield Item(prompt=str(turns), reference=None, answer=None)
