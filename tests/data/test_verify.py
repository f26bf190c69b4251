"""Verifiers: which answers count as equal."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allo_ray.config.data import VerifyConfig
from allo_ray.data.verify import Verifier, number, same_choice, same_number, same_text
from allo_ray.errors import UserError


def verifier(**settings) -> Verifier:
    return Verifier(VerifyConfig(**settings))


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("17 + 25 = 42. The answer is 42", "42"),
        ("The answer is: 42", "42"),
        ("the answer is 7. No, The Answer Is:8 \nQuestion", "8"),
        ("The answer is\n 42\nmore", "42"),
        ("no marker, 42", None),
        ("The answer is ", None),
    ],
)
def test_answer_is_the_text_after_the_last_marker(response: str, answer: str | None) -> None:
    assert verifier().extract(response) == answer


@pytest.mark.parametrize(
    ("fallback", "answer"),
    [
        ("none", None),
        ("whole", "first\nso 7 of 12 apples"),
        ("last_line", "so 7 of 12 apples"),
        ("last_number", "12"),
    ],
)
def test_fallback_without_marker(fallback: str, answer: str | None) -> None:
    assert verifier(fallback=fallback).extract(" first\nso 7 of 12 apples\n") == answer


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("1,000", "1000"),
        ("$1,000.00", "1000"),
        ("0.50", "0.5"),
        (".5", "0.5"),
        ("42.", "42"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("−3", "-3"),
        ("34 apples", "34"),
        ("50%", "50"),
        ("**12**", "12"),
        ("17 + 25 = 42", "42"),
        ("٣", "3"),
    ],
)
def test_equal_numbers(left: str, right: str) -> None:
    assert same_number(left, right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("1,00", "1"),
        ("1,000,00", "1000"),
        ("3/4", "3"),
        ("5 - 3", "5"),
        ("2e5", "2"),
        ("12:30", "12"),
        ("5²", "5"),
        ("1½", "1"),
        ("about 34", "34"),
        ("", ""),
        ("none", "none"),
        ("1000.001", "1000"),
    ],
)
def test_different_numbers(left: str, right: str) -> None:
    assert not same_number(left, right)


@given(st.integers(min_value=-(10**12), max_value=10**12))
def test_an_integer_equals_its_other_spellings(value: int) -> None:
    for spelling in (f"{value:,}", f"{value}.00", f"{value}.", f" {value} ", f"{value} km"):
        assert number(spelling) == Decimal(value), spelling


@given(st.integers(min_value=-(10**6), max_value=10**6), st.integers(min_value=-(10**6), max_value=10**6))
def test_numbers_are_equal_only_if_they_are(left: int, right: int) -> None:
    assert same_number(f"{left:,}", str(right)) == (left == right)


@given(st.text(max_size=30))
def test_no_text_breaks_a_comparison(text: str) -> None:
    for compare in (same_text, same_number, same_choice):
        compare(text, "(B) 12")
    assert same_text(text, text)


@pytest.mark.parametrize(
    "given_answer", ["B", "b", "(B)", "B.", "(b) train station", "B: Train Station.", "train station"]
)
def test_choice_by_letter_or_text(given_answer: str) -> None:
    assert same_choice(given_answer, "(B) train station")


@pytest.mark.parametrize("given_answer", ["C", "(C) train station", "B. race track", "train", "Because", ""])
def test_wrong_choices(given_answer: str) -> None:
    """`Because` begins with B, and is no letter; a letter and a text that disagree are no answer."""
    assert not same_choice(given_answer, "(B) train station")


def test_choice_among_numbers_and_letters() -> None:
    assert same_choice("1000", "(D) 1,000")
    assert same_choice("A", "(C) A")  # the option's text is itself a letter
    assert same_choice("blood type a", "Blood type A")


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("2x+x", "3x", True),
        ("$\\sqrt{4}$", "2", True),
        ("\\frac{1}{3}", "0.5", False),
    ],
)
def test_math(left: str, right: str, same: bool) -> None:
    pytest.importorskip("math_verify")
    response = f"So. The answer is {left}"
    assert verifier(kind="math").check("", response, right)[1] is same


def test_check_tells_answer_and_verdict() -> None:
    checker = verifier(kind="numeric")
    assert checker.check("", "The answer is 1,000", "1000") == ("1,000", True)
    assert checker.check("", "I do not know", "1000") == (None, False)
    assert checker.check("", "The answer is 5", None) == ("5", None)


def test_gold_of_a_reference() -> None:
    assert verifier().gold("17 + 25 = 42. The answer is 42") == "42"
    assert verifier().gold(" 42 ") == "42"


def ends_like(prompt: str, response: str, answer: str) -> bool:
    """A user's verifier, for the test below."""
    return response.endswith(answer) and prompt == "p"


def test_callable() -> None:
    checker = verifier(kind="callable", function=f"{__name__}:ends_like")
    assert checker.check("p", "so 7", "7")[1] is True
    assert checker.check("q", "so 7", "7")[1] is False


@pytest.mark.parametrize("name", ["no_colon", "no.such.module:f", "json:no_such_function"])
def test_callable_that_cannot_be_imported(name: str) -> None:
    with pytest.raises(UserError, match=r"verify\.function"):
        verifier(kind="callable", function=name)
