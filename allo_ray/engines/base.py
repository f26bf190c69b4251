"""The interface of an engine: generate responses, score given responses, change weights.

Legend: T tokens of a sequence (context + response), R response tokens. Log-probs are natural logarithms (nats) of the
model's own distribution, at temperature 1 and without any truncation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. temperature 0 is greedy; a response ends at its stop string, the end token or the limit.

    `ignore_eos` makes every response `max_tokens` long, which only measurements want.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True)
class GenerateRequest:
    """One response to one prompt. Equal seeds give equal responses; greedy requests need none."""

    prompt_ids: Sequence[int]
    seed: int | None = None


@dataclass(frozen=True)
class ScoreRequest:
    """A response whose tokens are scored one by one, each given the context and the response before it."""

    context_ids: Sequence[int]
    response_ids: Sequence[int]


@dataclass(frozen=True)
class Completion:
    """A response. `token_ids` are the engine's own, with the end token or the tokens of the stop string where it
    stopped there; `text` has neither. `finish_reason` is "stop" or "length"."""

    token_ids: list[int]
    text: str
    finish_reason: str


class EngineDied(RuntimeError):
    """The engine broke while it worked; it answers no more and has to be replaced."""


class Engine(Protocol):
    """What both engines do. Calls may come from several threads at once; answers keep the order of the requests."""

    #: Longest sequence, prompt and response together, in tokens.
    max_model_len: int
    #: Seconds from the start of construction to the first request served.
    startup_seconds: float

    def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Completion]: ...

    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray]:
        """Returns one float32 array [R] of log-probs for each request."""
        ...

    def load_weights(self, folder: str) -> None:
        """Takes over the weights of another model of the same architecture, without a restart."""
        ...

    def gauges(self) -> dict[str, float]:
        """What the engine is doing: `running`, `waiting` (requests), `cached_tokens`, `prompt_tokens` (so far)."""
        ...

    def close(self) -> None: ...


def sample_seed(run_seed: int, prompt_id: str, index: int) -> int:
    """Seed of sample `index` of a prompt: 62 bits that depend on nothing else (not on batches, actors or restarts)."""
    told = f"{run_seed}\x00{prompt_id}\x00{index}".encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "little") >> 2


def model_facts(folder: str) -> dict[str, Any]:
    """The model's config.json, that of its text part where it has several."""
    told = json.loads((Path(folder) / "config.json").read_text())
    return told.get("text_config", told)
