"""Autoregressive decoding with a transformers model: one seed per row, stop strings, rows leave when they are done.

Legend: S rows still running, T tokens so far (left-padded), V vocabulary. Each row draws from a generator of its
own, by inverse transform over its sorted distribution, so its response does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from allo_ray.engines.base import Completion, GenerateRequest, Sampling


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
            answer = _finished(tokenizer, said[i], sampling, room, eos)
            if answer is None:
                keep.append(row)
            else:
                answers[i] = answer
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
    """The next token [S] for logits [S, V]."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs, order = (logits / sampling.temperature).softmax(-1).sort(-1, descending=True)
    total = probs.cumsum(-1)
    # The nucleus: the fewest tokens that reach top_p, so a token belongs to it if those before it do not.
    inside = total - probs < sampling.top_p
    mass = (probs * inside).sum(-1, keepdim=True)
    point = torch.stack([torch.rand((), generator=draw) for draw in draws])[:, None].to(logits.device) * mass
    rank = (total <= point).sum(-1, keepdim=True)
    return order.gather(-1, torch.minimum(rank, inside.sum(-1, keepdim=True) - 1)).squeeze(-1).cpu()


def _finished(
    tokenizer: Any, said: list[int], sampling: Sampling, room: int, eos: frozenset[int]
) -> Completion | None:
    """The completion if the last token ended it."""
    if said[-1] in eos and not sampling.ignore_eos:
        return Completion(said, tokenizer.decode(said[:-1], skip_special_tokens=True), "stop")
    if sampling.stop:
        text = tokenizer.decode(said, skip_special_tokens=True)
        cuts = [text.find(stop) for stop in sampling.stop if stop in text]
        if cuts:
            return Completion(said, text[: min(cuts)], "stop")
    if len(said) >= room:
        return Completion(said, tokenizer.decode(said, skip_special_tokens=True), "length")
    return None
