"""The teacher without a model: what it repairs, and what it leaves alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allo_ray.data.arithmetic_teacher import find_steps, rewrite

TWO = " 17 + 25 = 42. The answer is 42"
THREE = " 17 + 25 = 42, 42 - 8 = 34. The answer is 34"


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        # a wrong result, and what depended on it
        (" 17 + 25 = 43, 43 - 8 = 35. The answer is 35", THREE),
        (" 17 + 25 = 42, 42 - 8 = 36. The answer is 36", THREE),
        # the words are the prediction's own
        ("17 + 25 = 43; 43 - 8 = 35! So 35. The answer is: 35", "17 + 25 = 42; 42 - 8 = 34! So 34. The answer is: 34"),
        # right steps, wrong answer
        (" 17 + 25 = 42, 42 - 8 = 34. The answer is 35", THREE),
        # a number or a sign copied wrongly: the solution's stands in its place
        (" 17 + 52 = 69, 69 - 8 = 61. The answer is 61", THREE),
        (" 17 + 25 = 42, 42 + 8 = 50. The answer is 50", THREE),
        # no answer at all
        (" 17 + 25 = 42, 42 - 8 = 35", THREE),
        # without working
        (" The answer is 35", " The answer is 34"),
        (" so 35", " so 35. The answer is 34"),
        ("I think The answer is", "I think The answer is 34"),
        # what follows the answer stays
        (" The answer is 35 apples", " The answer is 34 apples"),
    ],
)  # fmt: skip
def test_repairs(prediction: str, expected: str) -> None:
    assert rewrite(prediction, THREE, "34") == expected


@pytest.mark.parametrize(
    ("prediction", "expected"), [(" 35", " 34"), (" 35 apples, not 7", " 34 apples, not 7"), (" none", None)]
)
def test_a_bare_answer_stays_bare(prediction: str, expected: str | None) -> None:
    """Where the solution is a number alone, nothing is put before it."""
    assert rewrite(prediction, " 34", "34") == expected


def test_a_wrong_number_that_the_question_has_too_stays_where_it_was_given() -> None:
    """5 + 5 = 5: the wrong result equals the operands; only the result is repaired, and the answer."""
    assert rewrite(" 5 + 5 = 5. The answer is 5", " 5 + 5 = 10. The answer is 10", "10") == (
        " 5 + 5 = 10. The answer is 10"
    )


def test_steps_that_are_not_the_solutions_cannot_be_repaired() -> None:
    assert rewrite(" 17 + 25 = 42, 42 - 8 = 34, 34 + 1 = 35. The answer is 35", THREE, "34") is None


def test_an_answer_that_is_no_number_is_not_this_teachers() -> None:
    assert rewrite(" The answer is 3", " The answer is blue", "blue") is None


@pytest.mark.parametrize(
    ("step", "right"),
    [
        ("6 * 7 = 41", "42"),
        ("6 × 7 = 41", "42"),
        ("10 / 4 = 2", "2.5"),
        ("3 - 8 = 5", "-5"),
        ("1,000 + 1 = 101", "1001"),
    ],
)
def test_signs(step: str, right: str) -> None:
    written = f"{step.split('=')[0]}= {right}"
    assert rewrite(f"{step}. The answer is 0", "", right) == f"{written}. The answer is {right}"


def test_chains_and_equations_are_no_steps() -> None:
    assert [step.result for step in find_steps("1 + 2 + 3 = 6. 2 + 3 = 5")] == ["5"]
    assert find_steps("v1.2 - 3") == []


operands = st.integers(0, 99)


@given(a=operands, b=operands, c=operands, wrong=st.integers(-20, 20), late=st.integers(-20, 20))
def test_any_slips_in_the_results_are_repaired(a: int, b: int, c: int, wrong: int, late: int) -> None:
    """Slips in either result, carried on, always end in the solution itself, for the words are the same."""
    first, second = a + b, a + b - c
    solution = f" {a} + {b} = {first}, {first} - {c} = {second}. The answer is {second}"
    slip, end = first + wrong, first + wrong - c + late
    prediction = f" {a} + {b} = {slip}, {slip} - {c} = {end}. The answer is {end}"
    assert rewrite(prediction, solution, str(second)) == solution


@given(st.text(max_size=60))
def test_no_text_breaks_it(text: str) -> None:
    told = rewrite(text, TWO, "42")
    assert told is None or "42" in told
