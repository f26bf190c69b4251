"""The quickstart's task: sums and differences with the working written out, made here from a seed.

No number pair of a test question occurs in training, in any order: every unordered pair of numbers belongs to
one side, decided by a seeded hash. A question belongs to a side only if all its pairs do: for `a ± b` the pair
{a, b}; for `a ± b ± c` the pairs {a, b}, {a, c}, {b, c} and the pair of the second step, {a ± b, c}. So a test
question asks for no calculation, whole or in part, that training has shown.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, combinations_with_replacement
from typing import ClassVar, Literal

from allo_ray.errors import UserError
from evals.suites.base import Item

#: Rejection sampling visits nearly every question of a small space within this many tries a question.
TRIES_PER_QUESTION = 12
COUNTED_RANGE = 300


@dataclass(frozen=True)
class Arithmetic:
    """Questions such as `17 + 25 - 8`.

    steps: numbers in a question, 2 or 3.
    limit: the largest number of a question; the smallest is `lowest`.
    results: "natural" keeps every result, also between the steps, at 0 or above; "integer" allows negative ones.
    form: "working" ends ` 17 + 25 = 42, 42 - 8 = 34. The answer is 34`; "answer" is ` The answer is 34`;
        "bare" is ` 34`, for templates that end in "The answer is".
    train, sft, test: how many questions each split has. `sft` and `train` come from the same side and share no
        question; `test` comes from the other side.
    test_share: the share of number pairs that belong to the test side.
    """

    name: ClassVar[str] = "arithmetic"
    verifier: ClassVar[str] = "numeric"

    steps: Literal[2, 3] = 2
    limit: int = 99
    lowest: int = 1
    results: Literal["natural", "integer"] = "natural"
    form: Literal["working", "answer", "bare"] = "working"
    train: int = 400
    sft: int = 300
    test: int = 300
    test_share: float = 0.3
    seed: int = 17

    def __post_init__(self) -> None:
        if self.steps not in (2, 3):
            raise UserError(f"suite arithmetic: steps is {self.steps!r}; use 2 or 3")
        if self.form not in ("working", "answer", "bare"):
            raise UserError(f"suite arithmetic: form is {self.form!r}; use working, answer or bare")
        if self.results not in ("natural", "integer"):
            raise UserError(f"suite arithmetic: results is {self.results!r}; use natural or integer")
        if not 0 < self.test_share < 1:
            raise UserError(
                f"suite arithmetic: test_share is {self.test_share}; use a number between 0 and 1"
            )
        if not 0 <= self.lowest < self.limit:
            raise UserError(
                f"suite arithmetic: lowest {self.lowest}, limit {self.limit}; use 0 <= lowest < limit"
            )

    def rows(self, split: str) -> Iterator[Item]:
        """Yields the questions of "train", "sft" or "test"; `train` does not change when `sft` grows."""
        sizes = {"train": (0, self.train), "sft": (self.train, self.train + self.sft), "test": (0, self.test)}
        if split not in sizes:
            raise UserError(f"suite arithmetic: no split '{split}'; use train, sft or test")
        start, stop = sizes[split]
        questions = self._questions(test=split == "test", count=stop)
        for position, (numbers, signs) in enumerate(questions):
            if position >= start:
                yield self._item(numbers, signs)

    def _questions(self, test: bool, count: int) -> Iterator[tuple[list[int], list[str]]]:
        """Yields `count` different questions of one side in a seeded order, so that more asks for no others."""
        draw = random.Random(f"arithmetic/{self.seed}/{self.steps}/{self.lowest}/{self.limit}/{test}")
        span = self.limit - self.lowest + 1
        space = span**self.steps * 2 ** (self.steps - 1)
        seen: set[tuple[int, ...] | str] = set()
        for _ in range(TRIES_PER_QUESTION * space):
            if len(seen) == count:
                return
            numbers = [draw.randint(self.lowest, self.limit) for _ in range(self.steps)]
            signs = [draw.choice("+-") for _ in range(self.steps - 1)]
            key = _question(numbers, signs)
            results = _results(numbers, signs)
            if key in seen or (self.results == "natural" and min(results) < 0):
                continue
            if all((self._hash(pair) < self._cut) == test for pair in _pairs(numbers, results)):
                seen.add(key)
                yield numbers, signs
        if len(seen) < count:
            side = "test" if test else "train"
            raise UserError(
                f"suite arithmetic: only {len(seen)} different {side} questions exist with steps {self.steps}, numbers "
                f"{self.lowest} to {self.limit} and test_share {self.test_share}, but {count} are asked for. "
                "Raise limit, change test_share, or ask for fewer."
            )

    @cached_property
    def _cut(self) -> int:
        """Pairs that hash below this are the test's: exactly `test_share` of the pairs of numbers in range."""
        numbers = range(self.lowest, self.limit + 1)
        if len(numbers) > COUNTED_RANGE:  # so many pairs that the share comes out right by itself
            return int(self.test_share * 2**64)
        hashes = sorted(self._hash(pair) for pair in combinations_with_replacement(numbers, 2))
        return hashes[min(len(hashes) - 1, round(self.test_share * len(hashes)))]

    def _hash(self, pair: tuple[int, int]) -> int:
        low, high = sorted(pair)
        digest = hashlib.blake2b(f"{self.seed}/{low}/{high}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")

    def _item(self, numbers: list[int], signs: list[str]) -> Item:
        results = _results(numbers, signs)
        answer = str(results[-1])
        if self.form == "bare":
            reference = f" {answer}"
        elif self.form == "answer":
            reference = f" The answer is {answer}"
        else:
            lefts = [numbers[0], *results]
            steps = [
                f"{left} {sign} {right} = {result}"
                for left, sign, right, result in zip(lefts, signs, numbers[1:], results, strict=False)
            ]
            reference = f" {', '.join(steps)}. The answer is {answer}"
        return Item(prompt=_question(numbers, signs), reference=reference, answer=answer)


def _question(numbers: list[int], signs: list[str]) -> str:
    return " ".join(
        [str(numbers[0]), *(f"{sign} {number}" for sign, number in zip(signs, numbers[1:], strict=True))]
    )


def _results(numbers: list[int], signs: list[str]) -> list[int]:
    """The result after each step, left to right."""
    results, value = [], numbers[0]
    for sign, number in zip(signs, numbers[1:], strict=True):
        value = value + number if sign == "+" else value - number
        results.append(value)
    return results


def _pairs(numbers: list[int], results: list[int]) -> list[tuple[int, int]]:
    """Every pair of numbers of a question, and the pair of every later step."""
    steps = zip(results, numbers[2:], strict=False)
    return [*combinations(numbers, 2), *steps]
