"""Who rewrites a negative: the arithmetic teacher, a local model behind the engine interface, or an endpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from allo_ray import tables
from allo_ray.config.engine import EngineConfig, SamplingConfig, TeacherConfig
from allo_ray.data import arithmetic_teacher
from allo_ray.data.inference import sample
from allo_ray.data.lookup import stream, write_stream
from allo_ray.data.templates import render
from allo_ray.data.tokenise import Tokeniser
from allo_ray.endpoint import Endpoint, RequestFailed
from allo_ray.engines.base import Sampling


@dataclass(frozen=True)
class Case:
    """A negative to rewrite. `context` is what a model reads; the rest serves the teacher without a model."""

    id: str
    context: str
    prediction: str
    reference: str
    answer: str | None


class Teacher(Protocol):
    """Yields (id, rewrite) in any order; None in the place of a rewrite that it could not make."""

    name: str

    def rewrite(self, cases: Iterable[Case]) -> Iterator[tuple[str, str | None]]: ...


class ArithmeticTeacher:
    """Repairs wrong calculations; see `arithmetic_teacher`."""

    name = "arithmetic"

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def rewrite(self, cases: Iterable[Case]) -> Iterator[tuple[str, str | None]]:
        for case in cases:
            answer = case.answer or ""
            yield case.id, arithmetic_teacher.rewrite(case.prediction, case.reference, answer, self.marker)


class ModelTeacher:
    """A local model, run by engine actors. Reads the context through its chat template where it has one."""

    def __init__(
        self,
        model: str,
        tokeniser: Tokeniser,
        engine: EngineConfig,
        sampling: SamplingConfig,
        folder: str | Path,
    ) -> None:
        """`model` is its folder, `tokeniser` its own; `folder` takes the answers; what it holds is not asked again."""
        self.name, self.tokeniser, self.engine = Path(model).name, tokeniser, engine
        self.sampling = Sampling(sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.stop)
        self.model, self.folder = model, Path(folder)
        self._template = "chat" if tokeniser.hf.chat_template else "plain"

    def rewrite(self, cases: Iterable[Case]) -> Iterator[tuple[str, str | None]]:
        prompts = self.folder / "prompts.parquet"
        count = write_stream(tables.PROMPTS, map(self._prompt, cases), prompts)
        if count == 0:
            return
        sample(prompts, self.model, self.engine, self.sampling, 1, str(self.folder / "samples"))
        for row in stream(tables.SAMPLES, self.folder / "samples", ["prompt_id", "text", "finish_reason"]):
            yield row["prompt_id"], row["text"] if row["finish_reason"] != "length" else None

    def _prompt(self, case: Case) -> dict[str, Any]:
        text = render(self._template, case.context, self.tokeniser.hf)
        row = dict.fromkeys(tables.PROMPTS.schema.names)
        return row | {
            "id": case.id,
            "prompt": case.context,
            "text": text,
            "prompt_ids": self.tokeniser.prompt(text),
        }


class EndpointTeacher:
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(self, config: TeacherConfig) -> None:
        assert config.url is not None
        assert config.model is not None
        self.name = config.model
        self.endpoint = Endpoint(
            config.url,
            config.model,
            config.key_variable,
            config.concurrency,
            config.timeout_seconds,
            config.retries,
        )
        sampling = config.sampling
        self.options = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
        }
        if sampling.stop:
            self.options["stop"] = list(sampling.stop)

    def rewrite(self, cases: Iterable[Case]) -> Iterator[tuple[str, str | None]]:
        requests = ((case.id, [{"role": "user", "content": case.context}]) for case in cases)
        for name, answer in self.endpoint.complete(requests, **self.options):
            yield name, None if isinstance(answer, RequestFailed) else answer
