"""What a batch job asks of an engine: n samples of every prompt, or a score for every token of a response.

A work says which input columns it reads, which rows it refuses, what it asks, and which table its answers are in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from allo_ray import tables
from allo_ray.config.data import VerifyConfig
from allo_ray.data.verify import Verifier
from allo_ray.engines.base import Engine, GenerateRequest, Sampling, ScoreRequest, sample_seed

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Answers:
    """Rows of the work's table, and the tokens that went in and came out."""

    rows: list[dict[str, Any]]
    tokens_in: int
    tokens_out: int


class Work(Protocol):
    """What is asked for every input row. Frozen and picklable."""

    @property
    def table(self) -> tables.Table:
        """Table of the answers."""
        ...

    @property
    def key(self) -> str:
        """Its column that holds the id of the input row."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the input, `id` among them."""
        ...

    @property
    def requests(self) -> int:
        """Requests to the engine for each input row."""
        ...

    def told(self) -> dict[str, Any]:
        """Everything that decides the answers, as JSON."""
        ...

    def problem(self, row: Row, max_model_len: int) -> str | None:
        """Why a row cannot be answered, or None."""
        ...

    def answer(self, engine: Engine, rows: Sequence[Row]) -> Answers: ...


@dataclass(frozen=True)
class SampleWork:
    """n responses to every prompt (rows of PROMPTS), as rows of SAMPLES; judged where `verify` says how."""

    sampling: Sampling
    n: int
    seed: int
    verify: VerifyConfig | None = None

    table = tables.SAMPLES
    key = "prompt_id"
    columns = ("id", "prompt", "prompt_ids", "answer")

    @property
    def requests(self) -> int:
        return self.n

    def told(self) -> dict[str, Any]:
        verify = None if self.verify is None else self.verify.model_dump(mode="json")
        return {
            "sampling": asdict(self.sampling) | {"stop": list(self.sampling.stop)},
            "n": self.n,
            "verify": verify,
        } | ({"seed": self.seed} if self.sampling.temperature else {})

    def problem(self, row: Row, max_model_len: int) -> str | None:
        if not len(row["prompt_ids"]):
            return "the prompt has no tokens"
        if len(row["prompt_ids"]) >= max_model_len:
            return f"the prompt has {len(row['prompt_ids'])} tokens; the model reads {max_model_len} with its response"
        return None

    def answer(self, engine: Engine, rows: Sequence[Row]) -> Answers:
        # The samples of one prompt are neighbours: the engine computes their common beginning once.
        asked = [(row, i, sample_seed(self.seed, row["id"], i)) for row in rows for i in range(self.n)]
        done = engine.generate(
            [GenerateRequest(row["prompt_ids"], seed) for row, _, seed in asked], self.sampling
        )
        verifier = Verifier(self.verify) if self.verify is not None else None
        out = []
        for (row, index, seed), completion in zip(asked, done, strict=True):
            given, verdict = (None, None)
            if verifier is not None:
                given, verdict = verifier.check(row["prompt"], completion.text, row["answer"])
            out.append(
                {
                    "id": tables.content_id(row["id"], index),
                    "prompt_id": row["id"],
                    "index": index,
                    "seed": seed,
                    "text": completion.text,
                    "response_ids": completion.token_ids,
                    "finish_reason": completion.finish_reason,
                    "answer": given,
                    "verdict": verdict,
                }
            )
        tokens_in = self.n * sum(len(row["prompt_ids"]) for row in rows)
        return Answers(out, tokens_in, sum(len(completion.token_ids) for completion in done))


#: Log-probs of given responses, for those who want more than probabilities.
SCORES = tables.Table(
    "scores",
    pa.schema(
        [pa.field("id", pa.string()), pa.field("logprobs", pa.list_(pa.float32()))],
        metadata={"allo_ray.table": "scores", "allo_ray.version": str(tables.VERSION)},
    ),
)


@dataclass(frozen=True)
class ScoreWork:
    """The probability (TOKEN_SCORES) or the log-prob (SCORES) of every token of given responses, in float32.

    Input columns: id, context_ids, response_ids.
    """

    logprobs: bool = False

    key = "id"
    columns = ("id", "context_ids", "response_ids")
    requests = 1

    @property
    def table(self) -> tables.Table:
        return SCORES if self.logprobs else tables.TOKEN_SCORES

    def told(self) -> dict[str, Any]:
        return {"score": "logprobs" if self.logprobs else "probabilities"}

    def problem(self, row: Row, max_model_len: int) -> str | None:
        if not len(row["context_ids"]):
            return "the context has no tokens, so the first token of the response has no probability"
        length = len(row["context_ids"]) + len(row["response_ids"])
        if length > max_model_len:
            return f"context and response have {length} tokens; the model reads {max_model_len}"
        return None

    def answer(self, engine: Engine, rows: Sequence[Row]) -> Answers:
        done = engine.score([ScoreRequest(row["context_ids"], row["response_ids"]) for row in rows])
        column = "logprobs" if self.logprobs else "p_re"
        out = [
            {"id": row["id"], column: told if self.logprobs else np.exp(told)}
            for row, told in zip(rows, done, strict=True)
        ]
        tokens = sum(len(row["context_ids"]) + len(row["response_ids"]) for row in rows)
        return Answers(out, tokens, sum(map(len, done)))
