"""What a suite is: a named source of questions with answers, and the verifier that compares answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypedDict


class Item(TypedDict):
    """One question.

    prompt: the raw question, before any template.
    reference: a full gold response, or None where the set has none.
    answer: the short gold answer that the verifier compares with, or None where a judge decides.
    """

    prompt: str
    reference: str | None
    answer: str | None


class Suite(Protocol):
    """A set of questions, the same in every run with the same arguments."""

    #: The name under which the registry knows it.
    name: str
    #: The kind of verifier its answers need (`exact`, `numeric`, `choice`, `math`), or "judge".
    verifier: str

    def rows(self, split: str) -> Iterator[Item]:
        """Yields the questions of `split`, always in the same order.

        Raises:
            UserError: there is no such split, or the files do not hold what they should.
        """
        ...


def options_text(texts: list[str]) -> str:
    """The block of answer options as the paper prints it (Table 7): one option a line, without letters."""
    return "Options:\n" + "\n".join(texts)


def choice_answer(label: str, text: str) -> str:
    """A gold answer that the `choice` verifier accepts by letter and by text."""
    return f"({label}) {text}"
