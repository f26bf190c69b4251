"""A second task that training never sees, to show what did not get worse: products, or which number is larger."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from allo_ray.errors import UserError
from evals.suites.base import Item


@dataclass(frozen=True)
class Transfer:
    """Products of small numbers (`7 * 8`), or the larger of two (`Which is larger, 47 or 38?`).

    kind: "products" or "comparison".
    lowest, limit: the range of the numbers.
    count: questions; all different. `products` has (limit - lowest + 1)² of them.
    """

    name: ClassVar[str] = "transfer"
    verifier: ClassVar[str] = "numeric"

    kind: Literal["products", "comparison"] = "products"
    lowest: int = 2
    limit: int = 9
    count: int = 64
    seed: int = 17

    def rows(self, split: str) -> Iterator[Item]:
        """Yields the questions; there is only the split "test"."""
        if split != "test":
            raise UserError(f"suite transfer: no split '{split}'; it has only test")
        if self.kind not in ("products", "comparison"):
            raise UserError(f"suite transfer: kind is {self.kind!r}; use products or comparison")
        span = max(0, self.limit - self.lowest + 1)
        space = span * span if self.kind == "products" else span * (span - 1)
        if self.count > space:
            raise UserError(
                f"suite transfer: count is {self.count}, but there are only {space} questions; lower it"
            )
        for index in random.Random(f"transfer/{self.seed}").sample(range(space), self.count):
            yield (
                self._product(*divmod(index, span))
                if self.kind == "products"
                else self._comparison(index, span)
            )

    def _product(self, left: int, right: int) -> Item:
        a, b = left + self.lowest, right + self.lowest
        answer = str(a * b)
        return Item(
            prompt=f"{a} * {b}", reference=f" {a} * {b} = {answer}. The answer is {answer}", answer=answer
        )

    def _comparison(self, index: int, span: int) -> Item:
        left, right = divmod(index, span - 1)
        a, b = left + self.lowest, right + (right >= left) + self.lowest  # never a number with itself
        answer = str(max(a, b))
        return Item(
            prompt=f"Which is larger, {a} or {b}", reference=f" The answer is {answer}", answer=answer
        )
