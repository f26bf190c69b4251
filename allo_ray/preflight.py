"""What is wrong with a config, found without a worker and before a long run: models, tokenizer, template, lengths,
verifier, the arguments of losses, and the questions that are asked at the end."""

from __future__ import annotations

from pathlib import Path

import torch

from allo_ray.config.data import SuiteConfig
from allo_ray.config.run import RunConfig
from allo_ray.data.templates import render
from allo_ray.data.tokenise import Tokeniser
from allo_ray.data.verify import Verifier
from allo_ray.engines.base import model_facts
from allo_ray.errors import UserError
from allo_ray.losses.base import LossInputs
from allo_ray.losses.registry import LOSSES
from allo_ray.models import named_folder
from evals.suites.registry import load_suite


def check(config: RunConfig) -> None:
    """Reads tokenizers and every evaluation question, no weights. Models that a hub holds are looked at by name alone.

    Raises:
        UserError: the first thing that is wrong, with what to change.
    """
    folder = named_folder(config.model.path, "model.path")
    if folder is not None:
        _check_model(folder, config)
    if config.reward is not None and config.reward.model is not None:
        other = named_folder(config.reward.model, "reward.model")
        if other is not None:
            Tokeniser(str(other))
            check_length(other, config.engine.max_model_len, "engine.max_model_len")
    if config.rewrite is not None and config.rewrite.kind == "model" and config.rewrite.model is not None:
        named_folder(config.rewrite.model, "rewrite.model")
    Verifier(config.verify)
    for name, baseline in config.baselines.items():
        _check_loss(f"baselines.{name}.args", baseline.loss, baseline.args)
    for suite in config.evaluate.suites:
        _check_suite(suite)


def check_length(folder: Path, tokens: int, key: str) -> None:
    """Raises UserError where the setting `key` allows more tokens than the model has positions."""
    longest = model_facts(str(folder)).get("max_position_embeddings")
    if longest is not None and tokens > longest:
        raise UserError(
            f"{key} is {tokens}, but the model in {folder} reads {longest} tokens. Set {key} to {longest} or less."
        )


def _check_model(folder: Path, config: RunConfig) -> None:
    tokeniser = Tokeniser(str(folder))
    for data, key in ((config.data, "data"), (config.sft and config.sft.data, "sft.data")):
        if data is not None:
            render(data.template, "a question", tokeniser.hf)
            check_length(folder, data.max_tokens, f"{key}.max_tokens")
    for suite in config.evaluate.suites:
        if suite.template is not None:
            render(suite.template, "a question", tokeniser.hf)


def _check_loss(key: str, name: str, args: dict[str, object]) -> None:
    """Computes the loss of one pair, which tells wrong arguments by name and by kind."""
    spec = LOSSES[name]
    spec.check(args)
    half, one = torch.full((2,), -0.5), torch.ones(2)
    try:
        spec.function(LossInputs(half, half, one, torch.tensor([0, 1]), 2), **args)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        raise UserError(f"{key}: {args} is nothing that the loss {name} takes ({error}).") from None


def _check_suite(suite: SuiteConfig) -> None:
    """Reads as many questions as will be asked."""
    asked = 0
    for _ in load_suite(suite).rows(suite.split):
        asked += 1
        if asked == suite.limit:
            break
    if not asked:
        raise UserError(f"evaluate.suites: {suite.title} has no questions in its split {suite.split}")
