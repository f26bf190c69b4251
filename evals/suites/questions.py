"""The paper's question-answering sets, from their official files: ECQA, QASC, OpenBookQA, StrategyQA.

The question and its options stand in the prompt as in the paper's Table 7. The references end in "The answer is ...",
so that they can serve for supervised training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from allo_ray.errors import UserError
from allo_ray.records import Record
from evals.suites.base import Item, choice_answer, options_text
from evals.suites.official import rows_of, take


@dataclass(frozen=True)
class ECQA:
    """CommonsenseQA questions with explanations (Aggarwal et al., 2021): cqa_data_<split>.csv."""

    name: ClassVar[str] = "ecqa"
    verifier: ClassVar[str] = "choice"
    path: str

    def rows(self, split: str) -> Iterator[Item]:
        """Fields: q_text, q_op1 to q_op5, q_ans (the option's text), taskB or taskA_pos (the explanation)."""
        for record in rows_of(self.path, split, self.name):
            texts = [str(take(record, self.name, f"q_op{i}")) for i in range(1, 6)]
            answer = str(take(record, self.name, "q_ans"))
            if answer not in texts:
                raise UserError(f"{record.place}: the answer {answer!r} is none of the options")
            why = str(record.values.get("taskB") or record.values.get("taskA_pos") or "").strip()
            yield _choice_item(str(take(record, self.name, "q_text")), texts, texts.index(answer), why)


@dataclass(frozen=True)
class QASC:
    """Questions that join two facts (Khot et al., 2020): {split}.jsonl, or the hub's rows."""

    name: ClassVar[str] = "qasc"
    verifier: ClassVar[str] = "choice"
    path: str

    def rows(self, split: str) -> Iterator[Item]:
        """Fields: question.stem and question.choices (or question and choices), answerKey, fact1, fact2."""
        for record in rows_of(self.path, split, self.name):
            facts = [
                str(record.values.get(name) or "").strip() for name in ("fact1", "fact2", "combinedfact")
            ]
            yield _keyed_item(record, self.name, " ".join(_sentence(fact) for fact in facts if fact))


@dataclass(frozen=True)
class OpenBookQA:
    """Elementary science (Mihaylov et al., 2018): {split}.jsonl, or the hub's rows."""

    name: ClassVar[str] = "openbookqa"
    verifier: ClassVar[str] = "choice"
    path: str

    def rows(self, split: str) -> Iterator[Item]:
        """Fields: question.stem and question.choices (or question_stem and choices), answerKey, fact1."""
        for record in rows_of(self.path, split, self.name):
            yield _keyed_item(record, self.name, _sentence(str(record.values.get("fact1") or "").strip()))


@dataclass(frozen=True)
class StrategyQA:
    """Yes-or-no questions with facts (Geva et al., 2021): strategyqa_{split}.json."""

    name: ClassVar[str] = "strategyqa"
    verifier: ClassVar[str] = "exact"
    path: str

    def rows(self, split: str) -> Iterator[Item]:
        """Fields: question, answer (true or false), facts (a list or a text)."""
        for record in rows_of(self.path, split, self.name):
            answer = take(record, self.name, "answer")
            if not isinstance(answer, bool):
                raise UserError(f"{record.place}, field 'answer': expected true or false, found {answer!r}")
            facts = record.values.get("facts") or []
            why = " ".join(facts) if isinstance(facts, list) else str(facts)
            gold = "yes" if answer else "no"
            reference = f"{why.strip()}\nThe answer is {gold}".strip()
            yield Item(prompt=str(take(record, self.name, "question")), reference=reference, answer=gold)


def _keyed_item(record: Record, suite: str, why: str) -> Item:
    """Rows in the layout of ARC: a stem, choices with labels, and the label of the right one."""
    choices: Any = take(record, suite, "question.choices", "choices")
    if isinstance(choices, dict):  # the hub keeps columns: {"text": [...], "label": [...]}
        labels, texts = list(choices["label"]), list(choices["text"])
    else:
        labels, texts = [choice["label"] for choice in choices], [choice["text"] for choice in choices]
    key = take(record, suite, "answerKey")
    if key not in labels:
        raise UserError(
            f"{record.place}, field 'answerKey': {key!r} is none of the labels {', '.join(labels)}"
        )
    stem = take(record, suite, "question.stem", "question_stem", "question")
    return _choice_item(str(stem), texts, labels.index(key), why)


def _choice_item(question: str, texts: list[str], right: int, why: str) -> Item:
    reference = f"{why}\nThe answer is {texts[right]}".strip()
    answer = choice_answer("ABCDEFGHIJ"[right], texts[right])
    return Item(prompt=f"{question.strip()}\n{options_text(texts)}", reference=reference, answer=answer)


def _sentence(text: str) -> str:
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."
