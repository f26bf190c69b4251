"""The paper's mathematical sets, from their official files: GSM8K, MATH, MAWPS, TabMWP."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from allo_ray.errors import UserError
from evals.suites.base import Item, choice_answer, options_text
from evals.suites.official import rows_of, take

_CALCULATOR = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class GSM8K:
    """Grade-school word problems (Cobbe et al., 2021): {split}.jsonl; the answer stands after `####`."""

    name: ClassVar[str] = "gsm8k"
    verifier: ClassVar[str] = "numeric"
    path: str

    def rows(self, split: str) -> Iterator[Item]:
        """Fields: question, answer. Calculator marks `<<48/2=24>>` are taken out of the reference."""
        for record in rows_of(self.path, split, self.name):
            working, mark, answer = str(take(record, self.name, "answer")).rpartition("####")
            if not mark:
                raise UserError(f"{record.place}, field 'answer': has no '#### <number>' at its end")
            reference = f"{_CALCULATOR.sub('', working).strip()}\nThe answer is {answer.strip()}"
            yield Item(
                prompt=str(take(record, self.name, "question")), reference=reference, answer=answer.strip()
            )


@dataclass(frozen=True)
class MATH:
    """Competition problems (Hendrycks et al., 2021): one JSON a problem, or rows; the answer is the last \\boxed."""

    name: ClassVar[str] = "math"
    verifier: ClassVar[str] = "math"
    path: str

    def rows(self, split: str) -> Iterator[Item]:
        """Fields: problem, solution."""
        for record in rows_of(self.path, split, self.name):
            solution = str(take(record, self.name, "solution"))
            answer = boxed(solution)
            if answer is None:
                raise UserError(f"{record.place}, field 'solution': has no \\boxed{{answer}}")
            reference = f"{solution.strip()}\nThe answer is {answer}"
            yield Item(prompt=str(take(record, self.name, "problem")), reference=reference, answer=answer)


@dataclass(frozen=True)
class MAWPS:
    """Word problems (Koncel-Kedziorski et al., 2016): the authors' JSON, or rows with question and result."""

    name: ClassVar[str] = "mawps"
    verifier: ClassVar[str] = "numeric"
    path: str

    def rows(self, split: str) -> Iterator[Item]:
        """Fields: sQuestion, lSolutions, lEquations (authors); Question, Answer, Numbers (N_00 places); or
        question, result."""
        for record in rows_of(self.path, split, self.name):
            question = str(take(record, self.name, "sQuestion", "Question", "question", "input"))
            for place, number in enumerate(str(record.values.get("Numbers") or "").split()):
                question = question.replace(f"N_{place:02d}", _short(number))
            found = take(record, self.name, "lSolutions", "Answer", "result", "answer", "target")
            answer = _short(str(found[0] if isinstance(found, list) else found))
            equations = record.values.get("lEquations") or []
            working = f"{equations[0]}. " if equations else ""
            yield Item(prompt=question.strip(), reference=f"{working}The answer is {answer}", answer=answer)


@dataclass(frozen=True)
class TabMWP:
    """Word problems over a table (Lu et al., 2023): problems_{split}.json, an object of problems by id."""

    name: ClassVar[str] = "tabmwp"
    verifier: ClassVar[str] = "choice"
    path: str

    def rows(self, split: str) -> Iterator[Item]:
        """Fields: table_title, table, question, choices (or null), unit, answer, solution.

        Most rows have a number as answer; the verifier compares numbers as numbers.
        """
        for record in rows_of(self.path, split, self.name):
            answer = str(take(record, self.name, "answer"))
            title, unit = record.values.get("table_title"), record.values.get("unit")
            parts = [
                f"Table: {title}" if title else "Table:",
                str(take(record, self.name, "table")),
                str(take(record, self.name, "question")) + (f" (Unit: {unit})" if unit else ""),
            ]
            choices = record.values.get("choices")
            gold = answer
            if choices:
                if answer not in choices:
                    raise UserError(f"{record.place}, field 'answer': {answer!r} is none of the choices")
                parts.append(options_text([str(choice) for choice in choices]))
                gold = choice_answer("ABCDEFGHIJ"[choices.index(answer)], answer)
            solution = str(record.values.get("solution") or "").strip()
            reference = f"{solution}\nThe answer is {answer}".strip()
            yield Item(prompt="\n".join(parts), reference=reference, answer=gold)


def boxed(solution: str) -> str | None:
    """What the last \\boxed{...} (or `\\boxed 5`) of a solution holds; braces inside it are matched."""
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    if start < 0:
        return None
    rest = (
        solution[start:].split("boxed" if solution[start:].startswith("\\boxed") else "fbox", 1)[1].lstrip()
    )
    if not rest.startswith("{"):
        return re.split(r"[$\s]", rest, maxsplit=1)[0] or None
    depth = 0
    for place, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if depth == 0:
            return rest[1:place]
    return None


def _short(number: str) -> str:
    """3.0 as 3; anything else as it is."""
    return re.sub(r"\.0+$", "", number.strip())
