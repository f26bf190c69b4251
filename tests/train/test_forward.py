"""Packed trees give the log-probs and gradients of every sequence computed alone, whatever the cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from allo_ray.train.batching import pack
from allo_ray.train.forward import Policy, load_model
from allo_ray.train.rows import Row


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def separate_logprobs(folder: Path, rows: list[Row], slopes: torch.Tensor) -> tuple[torch.Tensor, dict]:
    """transformers' own forward, one sequence at a time, full logits; gradients of (log-probs * slopes).sum()."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = []
    for row in rows:
        for response in (row.chosen, row.rejected):
            ids = torch.from_numpy(np.concatenate([row.prompt, response])).long()[None]
            logits = torch.log_softmax(model(ids).logits[0], -1)[len(row.prompt) - 1 : -1]
            found.append(logits.gather(1, ids[0, len(row.prompt) :, None])[:, 0])
    answers = torch.cat(found)
    (answers * slopes).sum().backward()
    return answers.detach(), gradients(model)


def packed_logprobs(
    folder: Path,
    groups: list[list[Row]],
    slopes: torch.Tensor,
    chunk: int | None = None,
    checkpointing: bool = False,
) -> tuple[torch.Tensor, dict]:
    model = load_model(folder, torch.float32, gradient_checkpointing=checkpointing)
    policy = Policy(model, chunk)
    answers = torch.cat([policy(pack(group, "pair")) for group in groups])
    (answers * slopes).sum().backward()
    return answers.detach(), gradients(model)


def assert_close(one: tuple[torch.Tensor, dict], other: tuple[torch.Tensor, dict]) -> None:
    torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-5)
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], atol=1e-5, rtol=1e-4, msg=name)


def tree(*ids: list[int]) -> Row:
    none = np.zeros(0, dtype=np.float32)
    prompt, chosen, rejected = (np.array(part, dtype=np.int32) for part in ids)
    return Row(0, "a", prompt, chosen, rejected, none, none, none)


def tokens_of(rows: list[Row]) -> int:
    return sum(len(row.chosen) + len(row.rejected) for row in rows)


def test_shared_prefix_equals_two_separate_sequences(
    folder: Path, make_rows: Callable[..., list[Row]]
) -> None:
    """The trees of 7 pairs in one row of tokens, against 14 sequences of transformers, each alone."""
    rows = make_rows(7)
    slopes = torch.randn(tokens_of(rows), generator=torch.Generator().manual_seed(0))
    assert_close(packed_logprobs(folder, [rows], slopes), separate_logprobs(folder, rows, slopes))


def test_a_common_beginning_is_computed_once(folder: Path, make_rows: Callable[..., list[Row]]) -> None:
    """Five prompts that begin with the same 12 tokens: these stand in the row once, 4 * 12 tokens fewer are read."""
    beginning = np.arange(20, 32, dtype=np.int32)
    rows = [replace(row, prompt=np.concatenate([beginning, row.prompt])) for row in make_rows(5, seed=8)]
    rows[2] = replace(rows[2], prompt=np.append(beginning, np.int32(7)))
    apart = sum(len(pack([row], "pair").tokens) for row in rows)
    packed = pack(rows, "pair")
    assert packed.grid.preamble == 12
    assert len(packed.tokens) == apart - 4 * 12
    slopes = torch.randn(tokens_of(rows), generator=torch.Generator().manual_seed(0))
    assert_close(packed_logprobs(folder, [rows], slopes), separate_logprobs(folder, rows, slopes))


def test_packing_chunking_and_checkpointing_change_nothing(
    folder: Path, make_rows: Callable[..., list[Row]]
) -> None:
    """One micro-batch = one row at a time; head in chunks of 3 states = whole; recomputed layers = kept ones."""
    rows = make_rows(5, seed=3)
    slopes = torch.randn(tokens_of(rows), generator=torch.Generator().manual_seed(0))
    whole = packed_logprobs(folder, [rows], slopes)
    assert_close(whole, packed_logprobs(folder, [[row] for row in rows], slopes))
    assert_close(whole, packed_logprobs(folder, [rows], slopes, chunk=3))
    assert_close(whole, packed_logprobs(folder, [rows], slopes, checkpointing=True))


def test_tree_of_a_pair_by_hand() -> None:
    """Prompt 5 6, chosen 7 8 9, rejected 7 4 3 2.

    The trunk is 5 6 7; chosen goes on with 8 (its last token 9 is never read), rejected with 4 3. Token 7 of both is
    predicted by state 1 and computed once; 8 and 4 by state 2, 9 by state 3, then 3 by 4 and 2 by 5.
    """
    packed = pack([tree([5, 6], [7, 8, 9], [7, 4, 3, 2])], "pair")
    assert packed.tokens.tolist() == [5, 6, 7, 8, 4, 3]
    assert packed.positions.tolist() == [0, 1, 2, 3, 3, 4]
    assert packed.states[packed.source].tolist() == [1, 2, 3, 1, 2, 4, 5]
    assert packed.targets[packed.source].tolist() == [7, 8, 9, 7, 4, 3, 2]
    assert len(packed.states) == 6
    assert packed.sequence.tolist() == [0, 0, 0, 1, 1, 1, 1]
    allowed = packed.grid.allowed[0, 0].int().tolist()
    assert allowed == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 1, 0],
        [1, 1, 1, 0, 1, 1],
    ]


def test_tokens_of_weight_zero_get_no_head(tiny_llama: Path, make_rows: Callable[..., list[Row]]) -> None:
    """They answer their reference, and carry no gradient; a row without any weighted token still gives a graph."""
    row = make_rows(1, seed=5)[0]
    weight = np.zeros(len(row.rejected), dtype=np.float32)
    weight[::2] = 1
    reference = np.full(len(row.rejected), -2.5, dtype=np.float32)
    packed = pack([replace(row, rejected_weight=weight, rejected_reference=reference)], "rejected")
    assert len(packed.states) == int(weight.sum())
    answers = Policy(load_model(tiny_llama, torch.float32))(packed)
    assert torch.equal(answers[1::2], torch.full_like(answers[1::2], -2.5))
    assert bool((answers[::2] != -2.5).all())
    nothing = pack([replace(row, rejected_weight=weight * 0, rejected_reference=reference)], "rejected")
    answers = Policy(load_model(tiny_llama, torch.float32))(nothing)
    assert answers.tolist() == reference.tolist()
    assert answers.requires_grad
