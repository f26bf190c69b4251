"""The teacher that needs no model: it repairs the arithmetic of a prediction with the fewest edits.

Each step `a op b = c` is calculated again. A wrong result is put right, and so is every later number that was only
there because of it; all else stays. Where the steps were calculated rightly but are not those of the correct solution
(a number was copied wrongly, say), the numbers and signs of the solution's steps are put in their places instead.
"""

from __future__ import annotations

import re
from decimal import Decimal, DivisionByZero, InvalidOperation
from typing import NamedTuple

from allo_ray.data.verify import number

_DIGITS = r"-?\d+(?:,\d{3})*(?:\.\d+)?"
_VALUE = rf"(?<![\w.]){_DIGITS}"
_STEP = re.compile(rf"({_VALUE})(\s*)([-+*/×÷−x])(\s*)({_DIGITS})(\s*=\s*)({_DIGITS})")
_NUMBER = re.compile(rf"{_VALUE}(?![\w]|\.\d)")


class Step(NamedTuple):
    """`left sign right = result`, and where the four stand in the text."""

    left: str
    sign: str
    right: str
    result: str
    spans: tuple[tuple[int, int], ...]


def rewrite(prediction: str, reference: str, answer: str, marker: str = "The answer is") -> str | None:
    """Returns the corrected prediction, ending in the right answer; None where it cannot be repaired in place.

    Args:
        prediction: the response to correct. reference: the correct solution, with its working or without.
        answer: the right answer, a number. marker: the words before an answer.
    """
    gold = number(answer)
    if gold is None:
        return None
    body, said, tail = _split(prediction, marker)
    steps = find_steps(body)
    if steps:
        mended = _recalculated(body)
        if number(find_steps(mended)[-1].result) != gold:
            mended = _as_solution(body, find_steps(reference))
        if mended is None:
            return None
    else:
        mended = body
    return _answered(mended, said, tail, answer, marker, bool(_split(reference, marker)[1]))


def find_steps(text: str) -> list[Step]:
    """The calculations written in a text, in their order; a chain `1 + 2 + 3 = 6` is none."""
    out = []
    for match in _STEP.finditer(text):
        if re.search(r"[-+*/×÷−x=]\s*$", text[: match.start()]):
            continue
        spans = tuple(match.span(group) for group in (1, 3, 5, 7))
        out.append(Step(match[1], match[3], match[5], match[7], spans))
    return out


def _recalculated(body: str) -> str:
    """The body with every result right, step after step, and the numbers that depended on a wrong one replaced."""
    done = 0
    while done < len(steps := find_steps(body)):
        step = steps[done]
        done += 1
        result = _calculate(step)
        if result is None or _value(step.result) == result:
            continue
        start, end = step.spans[3]
        given = {step.left, step.right}
        right = _written(result)
        later = _NUMBER.sub(
            lambda match, old=step.result, new=right, given=given: (
                new if match.group() == old and old not in given else match.group()
            ),
            body[end:],
        )
        body = body[:start] + right + later
    return body


def _as_solution(body: str, solution: list[Step]) -> str | None:
    """The body with the numbers and signs of the solution's steps; None where there are not as many steps."""
    steps = find_steps(body)
    if len(steps) != len(solution):
        return None
    for old, new in reversed(list(zip(steps, solution, strict=True))):
        for (start, end), told in reversed(list(zip(old.spans, new[:4], strict=True))):
            if number(body[start:end]) != number(told) or number(told) is None:
                body = body[:start] + told + body[end:]
    return body


def _split(prediction: str, marker: str) -> tuple[str, str, str]:
    """(text before the last marker, marker and blanks up to the answer, answer and what follows)."""
    found = list(re.finditer(re.escape(marker.rstrip(": ")) + r"\s*:?\s*", prediction, re.IGNORECASE))
    if not found:
        return prediction, "", ""
    return prediction[: found[-1].start()], found[-1].group(), prediction[found[-1].end() :]


def _answered(body: str, said: str, tail: str, answer: str, marker: str, marked: bool) -> str | None:
    """`marked`: the solution has the marker, so that a prediction without it lacks it."""
    if not said and not marked:
        return _NUMBER.sub(answer, body, count=1) if _NUMBER.search(body) else None
    if not said:
        stop = "" if not body.strip() or body.rstrip().endswith((".", "!", "?")) else "."
        lead = " " if not body or not body[-1].isspace() else ""
        return f"{body}{stop}{lead}{marker} {answer}"
    if number(tail.strip().split("\n", 1)[0]) == number(answer):
        return body + said + tail
    match = _NUMBER.search(tail.split("\n", 1)[0])
    if match is None:
        return f"{body}{said}{'' if said[-1].isspace() else ' '}{answer}"
    return body + said + tail[: match.start()] + answer + tail[match.end() :]


def _calculate(step: Step) -> Decimal | None:
    left, right = _value(step.left), _value(step.right)
    try:
        match step.sign:
            case "+":
                return left + right
            case "-" | "−":
                return left - right
            case "*" | "×" | "x":
                return left * right
            case _:
                quotient = left / right
                return quotient if quotient == round(quotient, 6) else None  # a rounded result may be right
    except (DivisionByZero, InvalidOperation):
        return None


def _value(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


def _written(value: Decimal) -> str:
    return (
        str(value.to_integral_value())
        if value == value.to_integral_value()
        else format(value.normalize(), "f")
    )
