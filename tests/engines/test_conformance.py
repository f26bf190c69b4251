"""Both engines give the same greedy text, the same scores within a tolerance, and samples that depend on seeds alone.

The engines run in actors, as they do in a job: vLLM changes torch for the whole process that imports it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from allo_ray.config.engine import EngineConfig, EngineResources
from allo_ray.engines.base import Completion, EngineDied, GenerateRequest, Sampling, ScoreRequest, sample_seed
from allo_ray.engines.build import build_engine, engine_environment
from allo_ray.models import tiny_model

#: Largest difference of a log-prob between the engines in float32; 3e-6 measured on the tiny models.
TOLERANCE = 2e-5


@ray.remote
class EngineActor:
    def __init__(self, config: EngineConfig, model: str) -> None:
        self.engine = build_engine(config, model)

    def call(self, name: str, *args: Any) -> Any:
        return getattr(self.engine, name)(*args)

    def longest(self) -> int:
        return self.engine.max_model_len

    def break_down(self) -> None:
        """vLLM's next step raises."""

        def step() -> None:
            raise RuntimeError("out of memory")

        inner: Any = self.engine
        inner._engine.step = step


@dataclass
class Remote:
    """An engine in its actor."""

    actor: Any

    def generate(self, requests: list[GenerateRequest], sampling: Sampling) -> list[Completion]:
        return ray.get(self.actor.call.remote("generate", requests, sampling))

    def score(self, requests: list[ScoreRequest]) -> list[np.ndarray]:
        return ray.get(self.actor.call.remote("score", requests))

    def load_weights(self, folder: Path) -> None:
        ray.get(self.actor.call.remote("load_weights", str(folder)))


def start(kind: str, model: Path) -> Remote:
    config = EngineConfig(
        kind=kind,  # type: ignore[arg-type]
        dtype="float32",
        max_model_len=256,
        pool=EngineResources(kv_cache_gib=0.05, max_num_batched_tokens=256, max_num_seqs=16),
    )
    environment = {"env_vars": engine_environment(config)}
    return Remote(EngineActor.options(num_cpus=1, runtime_env=environment).remote(config, str(model)))  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def engines(ray_cluster: None, tiny_qwen: Path) -> Iterator[dict[str, Remote]]:
    both = {kind: start(kind, tiny_qwen) for kind in ("vllm", "transformers")}
    yield both
    for engine in both.values():
        ray.kill(engine.actor)


@pytest.fixture(params=["vllm", "transformers"])
def engine(request: pytest.FixtureRequest, engines: dict[str, Remote]) -> Remote:
    return engines[request.param]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 60 tokens."""
    draw = np.random.default_rng(seed)
    return [draw.integers(3, 380, size=draw.integers(1, 60)).tolist() for _ in range(count)]


def responses(count: int, seed: int = 1) -> list[ScoreRequest]:
    """Contexts and responses of 1 to 60 tokens, and one empty response."""
    draw = np.random.default_rng(seed)
    told = [
        ScoreRequest(prompt, draw.integers(3, 380, size=draw.integers(1, 60)).tolist())
        for prompt in prompts(count - 1, seed)
    ]
    return [*told, ScoreRequest([5, 6], [])]


def test_greedy_text_is_equal(engines: dict[str, Remote]) -> None:
    asked = [GenerateRequest(prompt) for prompt in prompts(24)]
    greedy = Sampling(temperature=0, top_p=1.0, max_tokens=24)
    assert engines["vllm"].generate(asked, greedy) == engines["transformers"].generate(asked, greedy)


def test_scores_agree(engines: dict[str, Remote]) -> None:
    asked = responses(24)
    theirs, ours = engines["vllm"].score(asked), engines["transformers"].score(asked)
    assert [len(row) for row in ours] == [len(request.response_ids) for request in asked]
    for left, right in zip(theirs, ours, strict=True):
        assert left.dtype == right.dtype == np.float32
        np.testing.assert_allclose(left, right, atol=TOLERANCE, rtol=0)


def test_scores_from_cached_contexts_agree(engines: dict[str, Remote]) -> None:
    """Contexts that begin alike (two blocks of the cache), and a response of which the cache holds a block itself."""
    draw = np.random.default_rng(7)
    start = draw.integers(3, 380, size=80).tolist()
    asked = [ScoreRequest([*start, *one.context_ids], one.response_ids) for one in responses(12, seed=8)]
    long = draw.integers(3, 380, size=70).tolist()
    asked += [ScoreRequest(start, long), ScoreRequest(start, [*long[:40], 5, 6])]
    right = engines["transformers"].score(asked)
    for _ in range(2):  # the second time every full block of every row is in the cache
        for told, expected in zip(engines["vllm"].score(asked), right, strict=True):
            np.testing.assert_allclose(told, expected, atol=TOLERANCE, rtol=0)


def test_scores_are_the_models_own(engine: Remote, tiny_qwen: Path) -> None:
    """The definition: log-softmax of the whole model's logits at the position before each response token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen, dtype=torch.float32)
    asked = responses(6, seed=5)
    for request, told in zip(asked, engine.score(asked), strict=True):
        ids = torch.tensor([[*request.context_ids, *request.response_ids]])
        with torch.inference_mode():
            logprobs = model(ids).logits[0].log_softmax(-1)
        first = len(request.context_ids)
        expected = [logprobs[first - 1 + i, token].item() for i, token in enumerate(request.response_ids)]
        np.testing.assert_allclose(told, np.array(expected, np.float32), atol=TOLERANCE, rtol=0)


def test_samples_depend_on_seeds_alone(engine: Remote) -> None:
    """One batch, batches of seven, and the reverse order give the same responses; other seeds give others."""
    asked = [
        GenerateRequest(prompt, sample_seed(3, str(i), k))
        for i, prompt in enumerate(prompts(8))
        for k in (0, 1, 2)
    ]
    sampling = Sampling(temperature=1.0, top_p=0.9, max_tokens=12)
    whole = engine.generate(asked, sampling)
    sevens = [done for i in range(0, len(asked), 7) for done in engine.generate(asked[i : i + 7], sampling)]
    assert whole == sevens == engine.generate(asked[::-1], sampling)[::-1]
    assert len({tuple(done.token_ids) for done in whole}) > len(whole) // 2


def test_a_prompt_longer_than_a_steps_tokens_is_sampled(engine: Remote) -> None:
    """Seeded requests whose prompts do not fit one step together: vLLM's CPU build dies if it cuts one in two."""
    asked = [GenerateRequest(list(range(3, 203)), seed) for seed in range(3)]
    done = engine.generate(asked, Sampling(temperature=1.0, top_p=1.0, max_tokens=4, ignore_eos=True))
    assert [len(completion.token_ids) for completion in done] == [4, 4, 4]


def test_a_stop_string_ends_the_response(engine: Remote) -> None:
    """ids keep the tokens of the stop string, the text does not have it."""
    prompt = prompts(1, seed=9)[0]
    free = engine.generate([GenerateRequest(prompt)], Sampling(temperature=0, max_tokens=24))[0]
    assert len(free.text) > 8
    stop = free.text[5:7]
    done = engine.generate([GenerateRequest(prompt)], Sampling(temperature=0, max_tokens=24, stop=(stop,)))[0]
    assert done.text == free.text[: free.text.index(stop)]
    assert done.finish_reason == "stop"
    assert done.token_ids == free.token_ids[: len(done.token_ids)]


def test_lengths_and_reasons(engine: Remote) -> None:
    done = engine.generate(
        [GenerateRequest([5, 6, 7])], Sampling(temperature=0, max_tokens=6, ignore_eos=True)
    )[0]
    assert (len(done.token_ids), done.finish_reason) == (6, "length")
    full = engine.generate(
        [GenerateRequest([5] * 250)], Sampling(temperature=0, max_tokens=64, ignore_eos=True)
    )[0]
    assert (len(full.token_ids), full.finish_reason) == (6, "length"), (
        "the response ends where the context does"
    )
    assert len(engine.score([ScoreRequest([5] * 200, [6] * 56)])[0]) == 56


def test_other_weights_are_taken_over(engines: dict[str, Remote], tiny_qwen: Path, tmp_path: Path) -> None:
    """After load_weights both engines score as the other model does, and as before once the first is back."""
    other = tiny_model("qwen", tmp_path / "other", seed=1)
    asked = responses(6, seed=2)
    long_prompt = [GenerateRequest(list(range(3, 103)))]
    greedy = Sampling(temperature=0, max_tokens=8, ignore_eos=True)
    for engine in engines.values():
        before, said = engine.score(asked), engine.generate(long_prompt, greedy)
        engine.load_weights(other)
        changed, said_other = engine.score(asked), engine.generate(long_prompt, greedy)
        engine.load_weights(tiny_qwen)
        assert all((a != b).any() for a, b in zip(before, changed, strict=True) if len(a))
        # The prompt's cached blocks belong to the old weights: had they stayed, the greedy text would mix both.
        assert said_other != said
        np.testing.assert_array_equal(np.concatenate(before), np.concatenate(engine.score(asked)))
        assert engine.generate(long_prompt, greedy) == said
    fresh = start("transformers", other)
    truth = fresh.score(asked)
    for engine in engines.values():
        engine.load_weights(other)
        for left, right in zip(engine.score(asked), truth, strict=True):
            np.testing.assert_allclose(left, right, atol=TOLERANCE, rtol=0)
        assert engine.generate(long_prompt, greedy) == fresh.generate(long_prompt, greedy)
        engine.load_weights(tiny_qwen)
    ray.kill(fresh.actor)


def test_a_vllm_that_breaks_fails_all_its_callers(ray_cluster: None, tiny_qwen: Path) -> None:
    """Who waits for an answer, who comes later, and who wants other weights: all are told, none waits without end."""
    broken = start("vllm", tiny_qwen)
    asked = [GenerateRequest(prompts(1)[0])]
    greedy = Sampling(temperature=0, max_tokens=4)
    assert len(broken.generate(asked, greedy)) == 1
    ray.get(broken.actor.break_down.remote())
    for _ in range(2):
        with pytest.raises(EngineDied, match="out of memory"):
            broken.generate(asked, greedy)
    with pytest.raises(EngineDied, match="out of memory"):
        broken.load_weights(tiny_qwen)
    ray.kill(broken.actor)


def test_seeds_differ_by_run_prompt_and_index() -> None:
    told = {
        sample_seed(run, prompt, index)
        for run in (0, 1)
        for prompt in ("a", "b", "a1")
        for index in range(12)
    }
    assert len(told) == 2 * 3 * 12
    assert all(0 <= seed < 2**62 for seed in told)
    assert sample_seed(17, "prompt", 3) == sample_seed(17, "prompt", 3)
    assert math.log2(max(told)) > 55
