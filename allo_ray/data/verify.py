"""Verifiers: is a response right? The answer is cut out of the response, then compared with the gold answer."""

from __future__ import annotations

import importlib
import re
import threading
import unicodedata
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from allo_ray.config.data import VerifyConfig
from allo_ray.errors import UserError

#: (prompt, response, answer) -> right or wrong.
UserVerifier = Callable[[str, str, str], bool]

_NUMBER = re.compile(r"[-+−]?\s*[$€£]?\s*[-−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?")
#: What shows, right after a number, that the answer is no plain number: 3/4, 5 - 3, 1,00, 2e5, 12:30.
_GOES_ON = re.compile(r"[.,:]?\d|[eE][-+]?\d|\s*[-+−*×·^/÷⁄\\]\s*[\d({$\\]")
_CHOICE = re.compile(r"^\(?([A-Za-z])\)(?:\s*[:.]?\s*(.*))?$|^([A-Za-z])(?:[.:]\s*(.*))?$", re.DOTALL)


class Verifier:
    """Extracts and compares answers as a `VerifyConfig` says."""

    def __init__(self, config: VerifyConfig) -> None:
        """Raises UserError where a callable cannot be imported or math-verify is not installed."""
        self.config = config
        # "The answer is" and "The answer is:" are the same marker; case does not matter.
        self._marker = re.compile(re.escape(config.marker.rstrip(": ")) + r"\s*:?", re.IGNORECASE)
        self._function = _load(config.function) if config.function else None
        self._same = {
            "exact": same_text,
            "numeric": same_number,
            "choice": same_choice,
            "math": same_formula,
        }.get(config.kind)
        if config.kind == "math":
            _math()

    def extract(self, response: str) -> str | None:
        """The text after the last marker, up to the end of its line; by `fallback` where there is no marker."""
        found = list(self._marker.finditer(response))
        if found:
            return _first_line(response[found[-1].end() :])
        match self.config.fallback:
            case "whole":
                return response.strip() or None
            case "last_line":
                lines = response.strip().splitlines()
                return lines[-1].strip() if lines else None
            case "last_number":
                numbers = _NUMBER.findall(response)
                return numbers[-1].strip() if numbers else None
            case _:
                return None

    def check(self, prompt: str, response: str, answer: str | None) -> tuple[str | None, bool | None]:
        """Returns the extracted answer, and whether it is right (None where there is no gold answer to compare).

        Raises:
            UserError: the user's own function fails.
        """
        given = self.extract(response)
        if answer is None:
            return given, None
        if self._function is not None:
            try:
                return given, bool(self._function(prompt, response, answer))
            except Exception as error:  # the user's code raises what it likes
                raise UserError(
                    f"verify.function: {self.config.function} raised {error!r} on the response {response[:80]!r} to "
                    f"the prompt {prompt[:80]!r}. It must return True or False for every response."
                ) from None
        assert self._same is not None
        return given, given is not None and self._same(given, answer)

    def gold(self, reference: str) -> str | None:
        """The short gold answer of a full reference; the whole reference where it has no marker."""
        return self.extract(reference) if self._marker.search(reference) else reference.strip() or None


def same_text(given: str, answer: str) -> bool:
    """Equal up to case, unicode form, runs of blanks, quotes around and a full stop at the end."""
    return _plain(given) == _plain(answer)


def same_number(given: str, answer: str) -> bool:
    """Equal as decimal numbers: 1,000 = 1000 = $1,000.00, 0.50 = 0.5, 50% = 50. Units after the number are ignored."""
    left, right = number(given), number(answer)
    return left is not None and left == right


def number(text: str) -> Decimal | None:
    """The number that a short answer states, None where it states none. Of `17 + 25 = 42` it is the right side."""
    text = text.rpartition("=")[2].strip().strip("*`\"'() ")
    match = _NUMBER.match(text)
    rest = text[match.end() :] if match else ""
    if match is None or _GOES_ON.match(rest) or rest[:1].isnumeric():
        return None
    try:
        return Decimal(re.sub(r"[\s,$€£]", "", match.group()).replace("−", "-"))
    except InvalidOperation:
        return None


def same_choice(given: str, answer: str) -> bool:
    """Equal by letter or by text. The gold answer is a letter, a text, or both as `(B) train station`.

    A given answer that states both must agree in both.
    """
    letter, text = _choice(given)
    gold_letter, gold_text = _choice(answer)
    if gold_letter is not None and gold_text is not None and _plain(given) == _plain(gold_text):
        return True  # an option may itself look like a letter
    if letter is not None and gold_letter is not None and letter != gold_letter:
        return False
    if text is not None and gold_text is not None:
        return _plain(text) == _plain(gold_text) or same_number(text, gold_text)
    return letter is not None and letter == gold_letter


def same_formula(given: str, answer: str) -> bool:
    """Equal by math-verify: numbers, fractions, LaTeX, sets, intervals."""
    if same_text(given, answer):
        return True
    parse, verify = _math()
    # Its time limit is a signal, which only a main thread may set.
    limit = 5 if threading.current_thread() is threading.main_thread() else None
    gold, found = parse(_latex(answer), parsing_timeout=limit), parse(_latex(given), parsing_timeout=limit)
    return bool(gold) and bool(found) and bool(verify(gold, found, timeout_seconds=limit))


def _latex(text: str) -> str:
    return text if "$" in text or "\\boxed" in text else f"${text.rstrip('.')}$"


def _choice(text: str) -> tuple[str | None, str | None]:
    """(letter, text) of an answer; either may be None."""
    text = text.strip().strip("*`").rstrip()
    match = _CHOICE.match(text.rstrip("."))
    if match is None:
        return None, text
    letter = match.group(1) or match.group(3)
    rest = match.group(2) or match.group(4)
    return letter.upper(), rest.strip() if rest and rest.strip() else None


def _plain(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.split()).strip("\"'`* ").removesuffix(".").strip()


def _first_line(text: str) -> str | None:
    stripped = text.strip()
    return stripped.splitlines()[0].strip() or None if stripped else None


def _load(name: str) -> UserVerifier:
    module, colon, function = name.partition(":")
    if not colon:
        raise UserError(f"verify.function: {name!r} is not of the form package.module:function")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"verify.function: {name} cannot be imported ({error}). Check name and PYTHONPATH."
        ) from None


def _math() -> tuple[Callable[..., list], Callable[..., bool]]:
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UserError("verify.kind: math needs the package math-verify: pip install math-verify") from None
    return parse, verify
