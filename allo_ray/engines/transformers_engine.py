"""transformers behind the engine interface: for machines without vLLM, and for fast scoring on the CPU.

Legend: S sequences of a batch, T tokens of the longest, R response tokens, C tokens of a chunk, V vocabulary.
Scoring sorts by length, pads on the right (a causal model never looks there), runs the head at the response's
positions only, and takes the log-softmax in chunks of tokens: [T, V] is never held.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from allo_ray.config.engine import EngineConfig
from allo_ray.engines.base import Completion, GenerateRequest, Sampling, ScoreRequest, model_facts
from allo_ray.engines.decoding import decode
from allo_ray.errors import UserError

#: Tokens whose logits [C, V] are held at a time.
CHUNK_TOKENS = 256


class TransformersEngine:
    """See `allo_ray.engines.base.Engine`. Calls of several threads are served one after the other."""

    def __init__(self, config: EngineConfig, model: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        started = time.monotonic()
        self._config = config
        self._device = torch.device("cuda" if config.pool.num_gpus > 0 else "cpu")
        if self._device.type == "cpu":
            torch.set_num_threads(config.pool.threads or max(1, int(config.pool.num_cpus)))
        self.max_model_len = min(
            config.max_model_len, model_facts(model).get("max_position_embeddings", config.max_model_len)
        )
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, config.dtype))
        self._model.to(self._device).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._lock = threading.Lock()
        self._prompt_tokens = 0
        self._check_head()
        self.startup_seconds = time.monotonic() - started

    @torch.inference_mode()
    def generate(self, requests: Sequence[GenerateRequest], sampling: Sampling) -> list[Completion]:
        answers: list[Completion | None] = [None] * len(requests)
        with self._lock:
            for picked in self._batches(
                [len(request.prompt_ids) for request in requests], sampling.max_tokens
            ):
                chosen = [requests[i] for i in picked]
                self._prompt_tokens += sum(len(request.prompt_ids) for request in chosen)
                done = decode(self._model, self._tokenizer, chosen, sampling, self.max_model_len, self._eos())
                for i, completion in zip(picked, done, strict=True):
                    answers[i] = completion
        return [answer for answer in answers if answer is not None]

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray]:
        scores: list[np.ndarray] = [np.zeros(0, np.float32)] * len(requests)
        with self._lock:
            lengths = [len(request.context_ids) + len(request.response_ids) for request in requests]
            for picked in self._batches(lengths, 0):
                chosen = [requests[i] for i in picked]
                self._prompt_tokens += sum(lengths[i] for i in picked)
                for i, row in zip(picked, self._score_batch(chosen), strict=True):
                    scores[i] = row
        return scores

    def load_weights(self, folder: str) -> None:
        from transformers import AutoModelForCausalLM

        with self._lock:
            fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, self._config.dtype))
            self._model.load_state_dict(fresh.state_dict())

    def gauges(self) -> dict[str, float]:
        busy = float(self._lock.locked())
        return {"running": busy, "waiting": 0, "cached_tokens": 0, "prompt_tokens": self._prompt_tokens}

    def close(self) -> None:
        del self._model

    def _batches(self, lengths: Sequence[int], extra: int) -> Iterator[list[int]]:
        """Indices of requests of about equal length, at most `max_num_batched_tokens` padded tokens together."""
        pool, order = self._config.pool, sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
        batch: list[int] = []
        for i in order:
            widest = (lengths[batch[0]] if batch else lengths[i]) + extra
            room = pool.max_num_batched_tokens
            if batch and ((len(batch) + 1) * widest > room or len(batch) == pool.max_num_seqs):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _score_batch(self, requests: Sequence[ScoreRequest]) -> list[np.ndarray]:
        rows = [[*request.context_ids, *request.response_ids] for request in requests]
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        # The position before a token gives that token's distribution.
        positions: list[int] = []
        for i, (row, request) in enumerate(zip(rows, requests, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            first = i * longest + len(request.context_ids) - 1
            positions.extend(range(first, first + len(request.response_ids)))
        ids = ids.to(self._device)
        where = torch.tensor(positions, dtype=torch.long, device=self._device)
        hidden = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [S, T, H]
        hidden = hidden.flatten(0, 1)[where]  # [R of all rows, H]
        told = self._logprobs(hidden, ids.flatten()[where + 1]).cpu().numpy()
        return np.split(told, np.cumsum([len(request.response_ids) for request in requests])[:-1])

    def _logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        head = self._model.get_output_embeddings()
        parts = []
        for start in range(0, len(targets), CHUNK_TOKENS):
            logits = head(hidden[start : start + CHUNK_TOKENS]).float()  # [C, V]
            picked = logits.gather(-1, targets[start : start + CHUNK_TOKENS, None]).squeeze(-1)
            parts.append(picked - logits.logsumexp(-1))
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)

    def _eos(self) -> frozenset[int]:
        told = self._model.generation_config.eos_token_id
        several = told if isinstance(told, (list, tuple)) else [told]
        return frozenset(i for i in [*several, self._tokenizer.eos_token_id] if i is not None)

    @torch.inference_mode()
    def _check_head(self) -> None:
        ids = torch.tensor([[0, 1]], device=self._device)
        hidden = self._model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        own = self._model.get_output_embeddings()(hidden)
        if not torch.allclose(own.float(), self._model(input_ids=ids).logits.float(), atol=1e-2, rtol=1e-2):
            raise UserError(
                f"{type(self._model).__name__} does more than one matrix product after its last layer (a scaled or "
                "capped head), which this engine does not know. Set engine.kind: vllm."
            )
