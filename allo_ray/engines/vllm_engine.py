"""vLLM behind the engine interface.

One thread owns the engine: it is built, stepped and reloaded there, because OpenMP gives every calling thread a pool
of its own and vLLM binds only the first. Requests of several callers run together, so that one caller's last long
responses share the steps with the next caller's first ones.
"""

from __future__ import annotations

import gc
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from allo_ray.config.engine import EngineConfig
from allo_ray.engines.base import Completion, EngineDied, GenerateRequest, Sampling, ScoreRequest, model_facts
from allo_ray.engines.vllm_cpu import FIRST, speed_up

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

#: Tokens of a block of the key-value cache. Only whole blocks of a prompt are shared between its samples.
BLOCK_TOKENS = 32


def vllm_environment(config: EngineConfig) -> dict[str, str]:
    """Environment variables of a process in which a vLLM engine runs; they must be there before vllm is imported."""
    told = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if config.pool.num_gpus == 0:
        # The engine runs inside the actor's own process; a process of its own would cost 20 s more to start.
        told["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return told


@dataclass
class _Request:
    """One request on its way: where its output goes."""

    prompt_ids: list[int]
    params: SamplingParams
    done: Future[RequestOutput]


class VllmEngine:
    """See `allo_ray.engines.base.Engine`."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        started = time.monotonic()
        for name, value in vllm_environment(config).items():
            os.environ.setdefault(name, value)
        self._config = config
        longest = model_facts(model).get("max_position_embeddings", config.max_model_len)
        self.max_model_len = min(config.max_model_len, longest)
        self._inbox: queue.SimpleQueue[_Request | tuple[Callable[[], Any], Future[Any]] | None] = (
            queue.SimpleQueue()
        )
        self._pending: dict[str, Future[RequestOutput]] = {}
        self._numbers = itertools.count()
        self._cached_tokens = self._prompt_tokens = 0
        self._ready: Future[None] = Future()
        self._died: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(model, longest), daemon=True, name="vllm")
        self._thread.start()
        self._ready.result()
        self.startup_seconds = time.monotonic() - started

    def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Completion]:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        def params(request: GenerateRequest) -> SamplingParams:
            return SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p if sampling.temperature else 1.0,
                max_tokens=min(sampling.max_tokens, self.max_model_len - len(request.prompt_ids)),
                stop=list(sampling.stop),
                seed=request.seed if sampling.temperature else None,
                ignore_eos=sampling.ignore_eos,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )

        outputs = self._submit([(list(request.prompt_ids), params(request)) for request in requests])
        answers = [output.outputs[0] for output in outputs]
        return [
            Completion(list(answer.token_ids), answer.text, str(answer.finish_reason)) for answer in answers
        ]

    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray]:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        cpu = self._config.pool.num_gpus == 0

        def params(request: ScoreRequest, cached: bool) -> SamplingParams:
            return SamplingParams(
                temperature=0,
                max_tokens=1,
                prompt_logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                extra_args={FIRST: len(request.context_ids)},
                skip_reading_prefix_cache=not cached,
            )

        def score(asked: Sequence[ScoreRequest], cached: bool) -> list[np.ndarray]:
            prompts = [([*one.context_ids, *one.response_ids], params(one, cached)) for one in asked]
            return [
                _response_logprobs(output, one)
                for output, one in zip(self._submit(prompts), asked, strict=True)
            ]

        # On the CPU what contexts begin with alike is computed once; a row of which the cache knew too much (NaN)
        # is computed again without it. vLLM's own scoring, on GPUs, never reads the cache.
        scores = score(requests, cached=cpu)
        again = [at for at, found in enumerate(scores) if np.isnan(found).any()] if cpu else []
        for at, found in zip(again, score([requests[at] for at in again], cached=False), strict=True):
            scores[at] = found
        return scores

    def load_weights(self, folder: str) -> None:
        self._call(lambda: self._load_weights(folder))

    def gauges(self) -> dict[str, float]:
        scheduler, inside = self._scheduler, len(self._pending)
        # An engine in a process of its own does not say which of its requests wait.
        running = len(scheduler.running) if scheduler else min(inside, self._config.pool.max_num_seqs)
        return {
            "running": running,
            "waiting": len(scheduler.waiting) if scheduler else inside - running,
            "cached_tokens": self._cached_tokens,
            "prompt_tokens": self._prompt_tokens,
        }

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def _submit(self, prompts: list[tuple[list[int], SamplingParams]]) -> list[RequestOutput]:
        requests = [_Request(ids, params, Future()) for ids, params in prompts]
        for request in requests:
            self._inbox.put(request)
        self._check()
        return [request.done.result() for request in requests]

    def _call(self, function: Callable[[], Any]) -> Any:
        done: Future[Any] = Future()
        self._inbox.put((function, done))
        self._check()
        return done.result()

    def _check(self) -> None:
        # After the put: whoever puts before the engine dies is failed by its thread, whoever puts after it is here.
        if self._died is not None:
            raise EngineDied(f"vLLM stopped: {self._died!r}") from self._died

    # What follows runs in the engine's own thread.

    def _run(self, model: str, longest: int) -> None:
        try:
            self._engine = self._start(model, longest)
            core = getattr(self._engine.engine_core, "engine_core", None)
            self._scheduler: Any = core.scheduler if core is not None else None
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        try:
            while self._take():
                self._step()
        except BaseException as error:
            self._died = error
        else:
            self._died = EngineDied("closed")
        self._fail_rest()

    def _step(self) -> None:
        """Computes one token of every running request and hands out the responses that are done."""
        for output in self._engine.step():
            if output.finished:
                told: Any = output
                self._prompt_tokens += len(told.prompt_token_ids or ())
                self._cached_tokens += told.num_cached_tokens or 0
                self._pending.pop(told.request_id).set_result(told)

    def _take(self) -> bool:
        """Takes what waits in the inbox; blocks while there is nothing to step. False once closed."""
        while True:
            idle = not self._engine.has_unfinished_requests()
            try:
                item = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if item is None:
                return False
            if isinstance(item, _Request):
                self._add(item)
                continue
            function, done = item
            try:
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)

    def _add(self, request: _Request) -> None:
        name = str(next(self._numbers))
        try:
            self._engine.add_request(name, {"prompt_token_ids": request.prompt_ids}, request.params)
        except ValueError as error:
            request.done.set_exception(error)
            return
        self._pending[name] = request.done

    def _fail_rest(self) -> None:
        waiting = list(self._pending.values())
        while True:
            try:
                item = self._inbox.get(block=False)
            except queue.Empty:
                break
            if item is not None:
                waiting.append(item.done if isinstance(item, _Request) else item[1])
        for done in waiting:
            done.set_exception(EngineDied(f"vLLM stopped: {self._died!r}"))

    def _start(self, model: str, longest: int) -> LLMEngine:
        # vllm imports 5,000 modules and then collects garbage five times: 2 to 3 s of 11 saved at start-up.
        gc.disable()
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        gc.freeze()
        gc.enable()
        pool, cpu = self._config.pool, self._config.pool.num_gpus == 0
        arguments: dict[str, Any] = dict(
            model=model,
            dtype=self._config.dtype,
            # One more than asked for: scoring a full-length row generates a token that nobody reads.
            max_model_len=min(self.max_model_len + 1, longest),
            max_num_batched_tokens=max(pool.max_num_batched_tokens, pool.max_num_seqs),
            max_num_seqs=pool.max_num_seqs,
            tensor_parallel_size=pool.tensor_parallel,
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
            generation_config="vllm",
            use_tqdm_on_load=False,
        )
        if cpu:
            # A seeded request whose prompt is cut into chunks dies on the CPU: its generator cannot be rewound.
            arguments |= dict(
                enable_chunked_prefill=False,
                max_num_batched_tokens=max(arguments["max_num_batched_tokens"], arguments["max_model_len"]),
            )
            arguments |= dict(
                enforce_eager=True,
                kv_cache_memory_bytes=int(pool.kv_cache_gib * 2**30),
                block_size=BLOCK_TOKENS,
            )
        else:
            arguments |= dict(gpu_memory_utilization=pool.gpu_memory_utilization)
        engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        if cpu:
            engine.collective_rpc(speed_up)
        return engine

    def _load_weights(self, folder: str) -> None:
        while self._engine.has_unfinished_requests():
            self._step()
        self._engine.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        assert self._engine.reset_prefix_cache(), "blocks of the old weights are still held"


def _response_logprobs(output: RequestOutput, request: ScoreRequest) -> np.ndarray:
    """Cuts the response's part [R] out of the log-probs of the whole prompt [T]."""
    told: Any = output.prompt_logprobs
    first = len(request.context_ids)
    starts = told.start_indices[first:]
    assert len(starts) == len(request.response_ids)
    # The first entry of a position is the token that stands there.
    return np.array([told.logprobs[start] for start in starts], dtype=np.float32)
