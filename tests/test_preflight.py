"""Configs that would fail late are told before anything starts, each with the setting to change."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from allo_ray import preflight
from allo_ray.config.load import load
from allo_ray.errors import UserError


def refused(message: str, *overrides: str) -> bool:
    """Whether the smoke preset with these changes is refused in such words."""
    with pytest.raises(UserError) as caught:
        preflight.check(load("smoke", overrides))
    return re.search(message, str(caught.value)) is not None


def test_what_is_right_passes(tiny_llama: Path) -> None:
    right = load("smoke", [f"model.path={tiny_llama}", f"reward.model={tiny_llama}"])
    assert preflight.check(right) is None


@pytest.fixture
def broken(tiny_llama: Path, tmp_path: Path) -> Callable[[str], str]:
    """broken(how): the path of a copy of the tiny model with that wrong."""

    def make(how: str) -> str:
        folder = tmp_path / how
        shutil.copytree(tiny_llama, folder)
        weights, config = folder / "model.safetensors", folder / "config.json"
        if how == "cut off":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif how == "no header":
            weights.write_bytes(weights.read_bytes()[:100])
        elif how == "no weights":
            weights.unlink()
        elif how == "pickled":
            weights.rename(folder / "pytorch_model.bin")
        elif how == "no tokenizer":
            for file in folder.glob("*token*"):
                file.unlink()
        elif how == "another vocabulary":
            config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 100}))
        elif how == "no chat template":
            for file in (folder / "chat_template.jinja", folder / "tokenizer_config.json"):
                if file.suffix == ".jinja":
                    file.unlink(missing_ok=True)
                else:
                    told = json.loads(file.read_text())
                    file.write_text(json.dumps({key: told[key] for key in told if key != "chat_template"}))
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut off", r"model\.safetensors: is cut off .* download it again"),
        ("no header", r"model\.safetensors: is cut off"),
        ("no weights", "no weights there"),
        ("pickled", "only pickled weights there"),
        ("no tokenizer", "the tokenizer cannot be loaded"),
        ("another vocabulary", r"the tokenizer has \d+ ids, but the model's vocabulary has 100"),
    ],
)
def test_a_broken_model(broken: Callable[[str], str], how: str, message: str) -> None:
    assert refused(message, f"model.path={broken(how)}")


def test_the_reward_model_is_looked_at_too(broken: Callable[[str], str]) -> None:
    assert refused("reward.model .*no weights there", f"reward.model={broken('no weights')}")
    assert refused("rewrite.model /tmp/none: no config", "rewrite={kind: model, model: /tmp/none}")
    assert refused("model.path tiny:gpt: there is none of that name", "model.path=tiny:gpt")
    assert refused("model.path package:gpt: there is none of that name", "model.path=package:gpt")


def test_a_template_that_the_tokenizer_lacks(broken: Callable[[str], str]) -> None:
    assert refused(
        "tokenizer has no chat template", f"model.path={broken('no chat template')}", "data.template=chat"
    )


def test_more_tokens_than_the_model_reads(tiny_llama: Path) -> None:
    assert refused(
        r"data\.max_tokens is 513, but .* reads 512", f"model.path={tiny_llama}", "data.max_tokens=513"
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("baselines={a: {loss: dpo, lr: 1e-6, args: {gamma: 3}}}", "no argument gamma; it has: beta"),
        ("baselines={a: {loss: dpo, lr: 1e-6, args: {beta: high}}}", r"baselines\.a\.args: .*'high'"),
        ("baselines={a: {loss: ipo, lr: 1e-6, args: {beta: 0}}}", r"baselines\.a\.args"),
        ("verify={kind: callable, function: 'nosuch.module:right'}", "nosuch"),
        ("evaluate.suites=[{name: gsm8k, path: /tmp/none.jsonl}]", "/tmp/none.jsonl: no such file"),
        ("evaluate.suites=[{name: arithmetic, split: dev}]", "dev"),
    ],
)
def test_a_setting_that_would_fail_late(override: str, message: str) -> None:
    assert refused(message, override)


def test_a_broken_question_is_found_before_the_models_are_trained(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text(json.dumps({"question": "1 + 1", "answer": "so 2\n#### 2"}) + "\n" + "{\n")
    assert refused("test.jsonl, line 2: broken JSON", f"evaluate.suites=[{{name: gsm8k, path: {file}}}]")
