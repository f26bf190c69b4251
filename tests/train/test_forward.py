"""Packed trees give the log-probs and gradients of every sequence computed alone, whatever the cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from allo_ray.losses.base import LossInputs
from allo_ray.losses.dpo import dpo
from allo_ray.neurons.parametrize import attach
from allo_ray.train import forward
from allo_ray.train.batching import pack
from allo_ray.train.forward import Policy, load_model
from allo_ray.train.rows import Row
from tests.neurons.reference import random_selection

#: Log-probs [R] -> the scalar whose gradient is compared.
Objective = Callable[[torch.Tensor], torch.Tensor]
VOCABULARY = 384


@dataclass(frozen=True)
class Result:
    loss: torch.Tensor
    answers: torch.Tensor
    gradients: dict[str, torch.Tensor]


def result(model: torch.nn.Module, answers: torch.Tensor, objective: Objective) -> Result:
    loss = objective(answers)
    loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return Result(loss.detach(), answers.detach(), found)


def random_slopes(rows: list[Row]) -> Objective:
    slopes = torch.randn(tokens_of(rows), generator=torch.Generator().manual_seed(0))
    return lambda answers: (answers * slopes).sum()


def dpo_loss(rows: list[Row]) -> Objective:
    """The sum of Eq. 2 against random references about ln 384, so that no two margins are equal."""
    packed = pack(rows, "pair")
    drawn = torch.randn(tokens_of(rows), generator=torch.Generator().manual_seed(1))

    def objective(answers: torch.Tensor) -> torch.Tensor:
        return dpo(LossInputs(answers, drawn - 6.0, packed.weight, packed.sequence, packed.sequences)).sum

    return objective


def separate_logprobs(folder: Path, rows: list[Row], objective: Objective) -> Result:
    """transformers' own forward, one sequence at a time, full logits."""
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
    return result(model, torch.cat(found), objective)


def packed_logprobs(
    folder: Path,
    groups: list[list[Row]],
    objective: Objective,
    chunk: int | None = None,
    checkpointing: bool = False,
) -> Result:
    model = load_model(folder, torch.float32, gradient_checkpointing=checkpointing)
    policy = Policy(model, chunk)
    return result(model, torch.cat([policy(pack(group, "pair")) for group in groups]), objective)


def assert_close(one: Result, other: Result) -> None:
    torch.testing.assert_close(one.loss, other.loss, atol=0, rtol=1e-5)
    torch.testing.assert_close(one.answers, other.answers, atol=0, rtol=1e-5)
    assert one.gradients.keys() == other.gradients.keys()
    for name, wanted in other.gradients.items():
        # An entry is a sum: its rounding is that of the terms, which may be larger than what they add up to.
        small = 1e-6 * max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(
            one.gradients[name],
            wanted,
            atol=small,
            rtol=1e-5,
            msg=lambda told, name=name: f"{name}: {told}",
        )


class Watch(TorchDispatchMode):
    """Counts rows as wide as the vocabulary: the most made at once, and all that are multiplied with the head."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.multiplied = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in tree_leaves(args) if torch.is_tensor(one)}
        for made in tree_leaves(out):
            if not torch.is_tensor(made) or made.untyped_storage().data_ptr() in given:
                continue  # a view of what was there: the transposed weight
            if made.shape[-1:] == (VOCABULARY,):
                self.largest = max(self.largest, made.numel() // VOCABULARY)
        if func is torch.ops.aten.mm.default and args[0].shape[1] == VOCABULARY:
            self.multiplied += args[0].shape[0]
        return out


def tree(*ids: list[int]) -> Row:
    none = np.zeros(0, dtype=np.float32)
    prompt, chosen, rejected = (np.array(part, dtype=np.int32) for part in ids)
    return Row(0, "a", prompt, chosen, rejected, none, none, none)


def tokens_of(rows: list[Row]) -> int:
    return sum(len(row.chosen) + len(row.rejected) for row in rows)


def test_shared_prefix_equals_two_separate_sequences(
    folder: Path, make_rows: Callable[..., list[Row]]
) -> None:
    """The trees of 7 pairs in one row of tokens, against 14 sequences of transformers, each alone.

    In the DPO loss, and in a random sum: there the gradients of tokens that both responses begin with do not cancel.
    """
    rows = make_rows(7)
    for objective in (dpo_loss(rows), random_slopes(rows)):
        assert_close(packed_logprobs(folder, [rows], objective), separate_logprobs(folder, rows, objective))


def test_a_common_beginning_is_computed_once(folder: Path, make_rows: Callable[..., list[Row]]) -> None:
    """Five prompts that begin with the same 12 tokens: these stand in the row once, 4 * 12 tokens fewer are read."""
    beginning = np.arange(20, 32, dtype=np.int32)
    rows = [replace(row, prompt=np.concatenate([beginning, row.prompt])) for row in make_rows(5, seed=8)]
    rows[2] = replace(rows[2], prompt=np.append(beginning, np.int32(7)))
    apart = sum(len(pack([row], "pair").tokens) for row in rows)
    packed = pack(rows, "pair")
    assert packed.grid.preamble == 12
    assert len(packed.tokens) == apart - 4 * 12
    objective = random_slopes(rows)
    assert_close(packed_logprobs(folder, [rows], objective), separate_logprobs(folder, rows, objective))


def test_packing_chunking_and_checkpointing_change_nothing(
    folder: Path, make_rows: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One micro-batch = one row at a time; recomputed layers = kept ones; head in chunks of 3 states = whole.

    The last with all probabilities kept, with those of the first chunk, and with none.
    """
    rows = make_rows(5, seed=3)
    for objective in (dpo_loss(rows), random_slopes(rows)):
        whole = packed_logprobs(folder, [rows], objective)
        assert_close(whole, packed_logprobs(folder, [[row] for row in rows], objective))
        assert_close(whole, packed_logprobs(folder, [rows], objective, checkpointing=True))
        for states in (1000, 5, 0):
            with monkeypatch.context() as patch:
                patch.setattr(forward, "KEPT_BYTES", states * 4 * VOCABULARY)
                assert_close(whole, packed_logprobs(folder, [rows], objective, chunk=3))


def test_states_without_a_gradient_stay_out_of_the_products(
    folder: Path, make_rows: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slopes of 1 for chosen and -1 for rejected tokens cancel out where both begin alike; every third is dropped.

    Nothing at all comes to the first two rows, which fill whole chunks of 4 states.
    """
    rows = make_rows(7)
    batch = pack(rows, "pair")
    slopes = 1.0 - 2.0 * (batch.sequence % 2)
    slopes[::3] = 0
    slopes[: tokens_of(rows[:2])] = 0
    alive = int(torch.zeros(len(batch.states)).index_add(0, batch.source, slopes).count_nonzero())
    assert 0 < alive < int(slopes.count_nonzero()), "no token cancels out"
    objective: Objective = lambda answers: (answers * slopes).sum()  # noqa: E731
    wanted = separate_logprobs(folder, rows, objective)
    for kept in (0, forward.KEPT_BYTES):
        monkeypatch.setattr(forward, "KEPT_BYTES", kept)
        with Watch() as watch:
            found = packed_logprobs(folder, [rows], objective, chunk=4)
        assert watch.multiplied == alive
        assert_close(found, wanted)
    idle = packed_logprobs(folder, [rows], lambda answers: answers.sum() * 0.0)
    assert idle.gradients.keys() == wanted.gradients.keys(), (
        "ZeRO waits for every gradient, also for one of zeros"
    )
    assert not any(gradient.any() for gradient in idle.gradients.values())


def test_logits_are_never_whole(
    folder: Path, make_rows: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for logits of 5 states and probabilities of 12: of over 50 states, 5 at a time and two chunks kept."""
    monkeypatch.setattr(forward, "CHUNK_BYTES", 5 * 4 * VOCABULARY)
    monkeypatch.setattr(forward, "KEPT_BYTES", 12 * 4 * VOCABULARY)
    rows = make_rows(7)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with Watch() as watch, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed_logprobs(folder, [rows], random_slopes(rows))
    assert watch.multiplied == len(pack(rows, "pair").states) > 50
    assert watch.largest == 5
    assert sum(len(one) for one in kept if one.shape[1:] == (VOCABULARY,)) == 10


class Largest(TorchDispatchMode):
    """The most entries that any tensor had that was made in memory of its own."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in tree_leaves(args) if strided(one)}
        for made in filter(strided, tree_leaves(out)):
            if made.untyped_storage().data_ptr() not in given:
                self.entries = max(self.entries, made.untyped_storage().nbytes() // made.element_size())
        return out


def strided(one: object) -> bool:
    return isinstance(one, torch.Tensor) and one.layout == torch.strided


def test_gradients_of_embedding_and_head_are_never_whole(
    folder: Path, make_rows: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries picked from blocks of 7 of the 384 rows, and from rows of used tokens, are those of the dense gradients.

    With one of ten neurons selected everything that the backward pass makes is smaller than the embedding's 384 x 64.
    """
    rows = make_rows(2)
    dense = packed_logprobs(folder, [rows], random_slopes(rows)).gradients
    monkeypatch.setitem(forward.BLOCK_BYTES, "cpu", 7 * 64 * 4)
    model = load_model(folder, torch.float32)
    selection = random_selection(model)
    neurons = attach(model, selection)
    batch = pack(rows, "pair")
    answers = Policy(model, chunk=3)(batch)
    loss = random_slopes(rows)(answers)
    with Largest() as largest:
        loss.backward()
    assert largest.entries < VOCABULARY * 64
    for name, values in neurons.named_values():
        wanted = dense[name].view(-1)[selection.indices[name].long()]
        small = 1e-6 * max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(
            values.grad, wanted, atol=small, rtol=1e-5, msg=lambda told, name=name: f"{name}: {told}"
        )


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
