"""Templates: what a question looks like to the model."""

from __future__ import annotations

import pytest

from allo_ray.data.templates import render, rewrite_context
from allo_ray.errors import UserError


class _Chat:
    chat_template = "yes"

    def apply_chat_template(self, turns, tokenize, add_generation_prompt):
        assert not tokenize
        assert add_generation_prompt
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns) + "<assistant>"


def test_plain_is_the_prompt_itself() -> None:
    assert render("plain", "1 + {prompt}") == "1 + {prompt}"


def test_a_text_keeps_its_other_braces() -> None:
    assert render("{x} Q: {prompt}\nA:", "a {y} b") == "{x} Q: a {y} b\nA:"


def test_paper_is_table_6() -> None:
    text = render("paper", "How many clips?")
    assert text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHow many clips?\n\n### Response: Let's think step by step."
    )


def test_chat_wraps_a_question_and_takes_a_conversation() -> None:
    assert render("chat", "hi", _Chat()) == "<user>hi<assistant>"
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert render("chat", turns, _Chat()) == "<system>s<user>u<assistant>"


def test_chat_without_a_chat_template_is_the_users_error() -> None:
    with pytest.raises(UserError, match="no chat template"):
        render("chat", "hi", object())


def test_unknown_template_is_named() -> None:
    with pytest.raises(UserError, match="'alpaca'"):
        render("alpaca", "hi")


def test_rewrite_context_puts_values_in_without_reading_braces_in_them() -> None:
    """A prediction that holds `{solution}` must not pull the solution in."""
    text = rewrite_context("p", "s", "{solution}")
    assert "### Prediction:\n{solution}\n" in text
    assert text.endswith("### Correct prediction:\n")
    assert text.count("### ") == 4
