"""Distributions of a campaign's space, as they stand in the YAML: `loguniform(0.01, 0.3)`, `choice(top, random)`."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import yaml
from pydantic import model_serializer, model_validator

from allo_ray.config.base import Section

Value = float | int | str | bool
KINDS = ("uniform", "loguniform", "randint", "choice", "grid")
#: Digits of a drawn number: enough for any threshold, and short in names and tables.
DIGITS = 4


class Distribution(Section):
    """Where one field is searched: numbers from `low` to `high`, both ends included, or one of `values`."""

    kind: Literal["uniform", "loguniform", "randint", "choice", "grid"]
    low: float | int = 0
    high: float | int = 0
    values: tuple[Value, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, told: Any) -> Any:
        if not isinstance(told, str):
            raise ValueError(f"write it as one of {', '.join(f'{kind}(...)' for kind in KINDS)}")
        match = re.fullmatch(r"\s*(\w+)\s*\((.*)\)\s*", told, re.DOTALL)
        if match is None or match[1] not in KINDS:
            raise ValueError(f"expected one of {', '.join(f'{kind}(...)' for kind in KINDS)}")
        kind, arguments = match[1], _arguments(match[2])
        if kind in ("choice", "grid"):
            if len(arguments) < 2 or len(set(arguments)) < len(arguments):
                raise ValueError(f"{kind} needs two values or more, each once")
            return {"kind": kind, "values": arguments}
        numbers = [x for x in arguments if isinstance(x, (int, float)) and not isinstance(x, bool)]
        whole = all(isinstance(x, int) for x in numbers)
        if not len(arguments) == len(numbers) == 2 or (kind == "randint" and not whole):
            raise ValueError(f"{kind} needs two {'whole ' if kind == 'randint' else ''}numbers, low and high")
        low, high = numbers
        if low >= high or (kind == "loguniform" and low <= 0):
            raise ValueError(f"{kind} needs {'0 < ' if kind == 'loguniform' else ''}low < high")
        return {"kind": kind, "low": low, "high": high}

    @model_serializer
    def told(self) -> str:
        """As it stands in the YAML."""
        arguments = self.values or (self.low, self.high)
        return f"{self.kind}({', '.join(yaml.safe_dump(x).split(chr(10))[0] for x in arguments)})"

    @property
    def ends(self) -> tuple[Value, ...]:
        """The values that a search can reach at most: both ends, or every choice."""
        return self.values or (self.low, self.high)

    @property
    def inside(self) -> Value:
        """A value as it may be drawn between the ends: of numbers no whole one, unless all are."""
        if self.values or self.kind == "randint":
            return self.ends[0]
        tried = [self.rounded(self.low + (self.high - self.low) / math.pi**power) for power in range(1, 9)]
        return next((value for value in tried if float(value) % 1), tried[0])

    def rounded(self, value: Value) -> Value:
        """A drawn value as trials use it: 4 significant digits, inside the bounds."""
        if self.values or not isinstance(value, float):
            return value
        return min(max(float(f"{value:.{DIGITS}g}"), float(self.low)), float(self.high))


def _arguments(text: str) -> list[Value]:
    """The values between the brackets; words need no quotes."""
    try:
        told = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        raise ValueError("the values between the brackets are no valid YAML list") from None
    return [_scalar(value) for value in told]


def _scalar(value: Any) -> Value:
    if isinstance(value, str):
        try:
            return float(value)  # YAML reads 5e-6, without a dot, as a word
        except ValueError:
            return value
    if not isinstance(value, (bool, int, float)):
        raise ValueError(f"{value!r} is neither a number nor a word")
    return value
