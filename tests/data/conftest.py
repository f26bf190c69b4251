"""Tables with made-up rows, valid against their schemas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from allo_ray.data.tokenise import Tokeniser

# A busy machine is slow now and then; that is no failure.
settings.register_profile("steady", deadline=None)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def tokeniser(tiny_llama: Path) -> Tokeniser:
    return Tokeniser(str(tiny_llama))


@pytest.fixture(scope="session")
def make_pair(tokeniser: Tokeniser) -> Callable[..., dict[str, Any]]:
    """make_pair(number, **changes): a PAIRS row about `number + 1`."""

    def make(number: int, **changes: Any) -> dict[str, Any]:
        prompt, right = f"{number} + 1", number + 1
        row: dict[str, Any] = {
            "id": f"{number:016x}",
            "prompt_id": f"prompt{number}",
            "prompt": prompt,
            "text": f"Question: {prompt}\nAnswer:",
            "reference": f" {prompt} = {right}. The answer is {right}",
            "chosen": f" {prompt} = {right}. The answer is {right}",
            "rejected": f" {prompt} = {right + 9}. The answer is {right + 9}",
            "chosen_source": "sample",
            "rejected_source": "sample",
        } | changes
        row["prompt_ids"] = tokeniser.prompt(row["text"])
        row["chosen_ids"] = tokeniser.response(row["chosen"])
        row["rejected_ids"] = tokeniser.response(row["rejected"])
        return row

    return make


@pytest.fixture(scope="session")
def logprobs_of() -> Callable[..., dict[str, Any]]:
    """logprobs_of(pair): a LOGPROBS row; token j of pair p has log-prob -(p + j / 100) on both sides."""

    def make(pair: dict[str, Any]) -> dict[str, Any]:
        base = int(pair["id"], 16)

        def values(count: int) -> list[float]:
            return (-(base + np.arange(count, dtype=np.float32) / 100)).tolist()

        return {
            "id": pair["id"],
            "chosen": values(len(pair["chosen_ids"])),
            "rejected": values(len(pair["rejected_ids"])),
        }

    return make
