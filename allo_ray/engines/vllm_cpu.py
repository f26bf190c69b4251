"""What vLLM 0.32 does slowly on the CPU, done faster: top-p, and the log-probs of given responses.

Legend: R response tokens of all requests of a step, C tokens of a chunk, V vocabulary. vLLM runs the head, a full
log-softmax, a top-k and a rank count over [tokens of the request, V] for every prompt token. Here the head runs at
the response's positions only, for all requests together, in chunks; nothing of size [tokens, V] is held.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from allo_ray.engines.nucleus import keep_nucleus

#: Key in `SamplingParams.extra_args`: position of the first token whose log-prob is wanted.
FIRST = "first_scored_token"
#: Tokens whose logits [C, V] are held at a time.
CHUNK_TOKENS = 256


def speed_up(worker: Any) -> None:
    """Replaces the two steps in a CPU worker; given to `LLMEngine.collective_rpc`."""
    from vllm.v1.sample.ops import topk_topp_sampler

    usual = topk_topp_sampler.apply_top_k_top_p

    def apply_top_k_top_p(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
        return keep_nucleus(logits, p) if k is None and p is not None else usual(logits, k, p)

    topk_topp_sampler.apply_top_k_top_p = apply_top_k_top_p
    runner = worker.model_runner
    runner._get_prompt_logprobs_dict = MethodType(response_logprobs, runner)


def response_logprobs(runner: Any, hidden: Tensor, scheduled: dict[str, int]) -> dict[str, Any]:
    """Takes the place of `GPUModelRunner._get_prompt_logprobs_dict`, for prompts that are computed in one step.

    Blocks of the context may come from the prefix cache. Returns, for each request that asked, vLLM's
    `LogprobsTensors` [prompt tokens - 1, 1]; the log-probs before FIRST are left at 0. All are NaN where the cache
    reached into the response, whose states are then not there.
    """
    from vllm.v1.outputs import LogprobsTensors

    out: dict[str, Any] = {}
    there: list[Any] = []
    where: list[Tensor] = []
    targets: list[Tensor] = []
    for name in list(runner.num_prompt_logprobs):
        if name not in scheduled:
            continue
        request = runner.requests[name]
        ids = request.prompt_token_ids
        cached = request.num_computed_tokens
        assert cached + scheduled[name] == len(ids), "prompts are never cut on the CPU"
        first = (request.sampling_params.extra_args or {}).get(FIRST, 1)
        told = out[name] = LogprobsTensors.empty_cpu(len(ids) - 1, 1)
        told.logprobs.fill_(torch.nan if cached >= first else 0)
        told.selected_token_ranks.zero_()
        told.logprob_token_ids[:, 0] = torch.tensor(ids[1:])
        del runner.num_prompt_logprobs[name]
        if cached < first:
            start = int(runner.query_start_loc.np[runner.input_batch.req_id_to_index[name]]) - cached
            where.append(torch.arange(start + first - 1, start + len(ids) - 1))
            targets.append(torch.tensor(ids[first:], dtype=torch.long))
            there.append(told)
    if there:
        scores = _score(runner.model, hidden, torch.cat(where), torch.cat(targets))
        for told, part in zip(there, scores.split([len(one) for one in targets]), strict=True):
            told.logprobs[len(told.logprobs) - len(part) :, 0] = part
    return out


def _score(model: Any, hidden: Tensor, where: Tensor, targets: Tensor) -> Tensor:
    """Log-probs [R] of `targets` [R] under the head applied at the rows `where` [R] of `hidden`."""
    scores = torch.empty(len(where))
    for start in range(0, len(where), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        logits = model.compute_logits(hidden[where[chunk]]).float()  # [C, V]
        scores[chunk] = logits.gather(-1, targets[chunk, None]).squeeze(-1) - logits.logsumexp(-1)
    return scores
