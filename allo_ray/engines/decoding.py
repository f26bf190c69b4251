"""Autoregressive decoding with a transformers model: one seed per row, stop strings, rows leave when they are done.

Legend: S rows still running, T tokens so far (left-padded), V vocabulary. Each row draws from a generator of its
own, by inverse transform, so its response does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from allo_ray.engines.base import Completion, GenerateRequest, Sampling
from allo_ray.engines.detokenise import GrowingText
from allo_ray.engines.nucleus import keep_nucleus


def decode(
    model: Any,
    tokenizer: Any,
    requests: Sequence[GenerateRequest],
    sampling: Sampling,
    max_model_len: int,
    eos: frozenset[int],
) -> list[Completion]:
    """Generates one response for each request, all in one batch.

    Args:
        model: causal LM with a key-value cache.
        tokenizer: gives the text of a response, for the stop strings too.
        requests: prompts, each with its seed.
        sampling: shared by the requests.
        max_model_len: prompt and response together, in tokens.
        eos: ids that end a response.
    """
    from transformers import DynamicCache

    device, longest = model.device, max(len(request.prompt_ids) for request in requests)
    ids = torch.zeros(len(requests), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, request in enumerate(requests):
        ids[i, longest - len(request.prompt_ids) :] = torch.tensor(list(request.prompt_ids))
        mask[i, longest - len(request.prompt_ids) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    running = list(range(len(requests)))
    draws = [torch.Generator().manual_seed((request.seed or 0) % 2**63) for request in requests]
    said: list[list[int]] = [[] for _ in requests]
    texts = [GrowingText(tokenizer, request.prompt_ids, sampling.stop) for request in requests]
    answers: dict[int, Completion] = {}
    while running:
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens = _draw(logits.float(), sampling, [draws[i] for i in running])
        keep = []
        for row, (i, token) in enumerate(zip(running, tokens.tolist(), strict=True)):
            said[i].append(token)
            room = min(sampling.max_tokens, max_model_len - len(requests[i].prompt_ids))
            if (token in eos and not sampling.ignore_eos) or texts[i].add(token):
                answers[i] = Completion(said[i], texts[i].text, "stop")
            elif len(said[i]) == room:
                answers[i] = Completion(said[i], texts[i].text, "length")
            else:
                keep.append(row)
        kept = torch.tensor(keep, dtype=torch.long, device=device)
        if len(keep) < len(running):
            running = [running[row] for row in keep]
            if running:
                cache.batch_select_indices(kept)
        ids = tokens.to(device)[kept, None]
        mask = torch.cat([mask[kept], mask.new_ones(len(keep), 1)], dim=1)
        positions = positions[kept, -1:] + 1
    return [answers[i] for i in range(len(requests))]


def _draw(logits: Tensor, sampling: Sampling, draws: Sequence[torch.Generator]) -> Tensor:
    """The next token [S], on the CPU, for logits [S, V]."""
    if sampling.temperature == 0:
        return logits.argmax(-1).cpu()
    logits = keep_nucleus(logits / sampling.temperature, torch.full((len(logits),), sampling.top_p))
    total = logits.softmax(-1, dtype=torch.float32).double().cumsum(-1).cpu()
    points = torch.stack([torch.rand((), generator=draw, dtype=torch.float64) for draw in draws])[:, None]
    # The first token whose running total exceeds the point; its own probability is above zero.
    return torch.searchsorted(total, points * total[:, -1:], right=True).squeeze(-1)
