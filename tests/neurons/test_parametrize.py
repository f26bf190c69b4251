"""Selected neurons as the only parameters: equal to dense AdamW with masked gradients, bit for bit in float32."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from allo_ray.errors import UserError
from allo_ray.neurons.parametrize import Neurons, attach
from allo_ray.neurons.selection import Selection, floating_parameters
from tests.neurons.reference import (
    make_model,
    mask_of,
    random_selection,
    tokens,
    train_masked,
    weights_of,
)

ADAM = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8}


def nll(seed: int) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(tokens(seed), labels=tokens(seed), use_cache=False).loss


def train(neurons: Neurons, losses: list[Callable[[nn.Module], Tensor]], steps: int) -> None:
    optimizer = torch.optim.AdamW(neurons.parameters(), **ADAM)  # pyright: ignore
    for _ in range(steps):
        for loss in losses:
            loss(neurons.model).backward()
        optimizer.step()
        optimizer.zero_grad()
        neurons.write()


def test_equals_masked_dense_adamw(kind: str):
    """Five steps of AdamW with weight decay, two accumulated losses each: every weight equal to the bit.

    Covers embeddings (tied and not), linear weights, biases, norms.
    """
    ours, theirs = make_model(kind), make_model(kind)
    selection = random_selection(ours)
    start = weights_of(ours)
    neurons = attach(ours, selection)
    train(neurons, [nll(0), nll(1)], steps=5)
    train_masked(theirs, selection, [nll(0), nll(1)], steps=5, **ADAM)
    neurons.detach()
    moved = 0
    for name, weight in theirs.named_parameters():
        mine = dict(ours.named_parameters())[name]
        assert torch.equal(mine, weight), name
        outside = ~mask_of(selection, name)
        assert torch.equal(mine.view(-1)[outside], start[name].view(-1)[outside]), name
        moved += int((mine != start[name]).sum())
    assert moved > 0.95 * selection.count


def test_all_equals_dense_adamw(kind: str):
    """k = 100 %: plain dense AdamW to the bit, without a second copy of the weights."""
    ours, theirs = make_model(kind), make_model(kind)
    neurons = attach(ours, Selection.of_model(ours))
    for tensor in neurons.attached:
        assert tensor.entries.values.data_ptr() == tensor.weight.data_ptr()
        assert tensor.entries.indices is None
    train(neurons, [nll(0)], steps=5)
    optimizer = torch.optim.AdamW(theirs.parameters(), **ADAM)  # pyright: ignore
    for _ in range(5):
        nll(0)(theirs).backward()
        optimizer.step()
        optimizer.zero_grad()
    neurons.detach()
    for name, weight in theirs.named_parameters():
        assert torch.equal(dict(ours.named_parameters())[name], weight), name


def test_dense_after_the_engine_moved_the_values(kind: str):
    """Engines put parameters into buffers of their own; then the weights follow by `write`."""
    model = make_model(kind)
    neurons = attach(model, Selection.of_model(model))
    for values in neurons.parameters():
        values.data = values.data.clone() + 1
    neurons.write()
    for tensor in neurons.attached:
        assert torch.equal(tensor.weight.view(-1), tensor.entries.values)


def gradients(neurons: Neurons) -> dict[str, Tensor]:
    out = {}
    for name, values in neurons.named_values():
        assert values.grad is not None
        out[name] = values.grad.clone()
        values.grad = None
    return out


def test_gradient_is_the_dense_one_at_the_indices(kind: str):
    ours, theirs = make_model(kind), make_model(kind)
    selection = random_selection(ours)
    neurons = attach(ours, selection)
    nll(0)(ours).backward()
    nll(0)(theirs).backward()
    found = gradients(neurons)
    for name, weight in theirs.named_parameters():
        assert weight.grad is not None
        assert torch.equal(found[name], weight.grad.view(-1)[selection.indices[name].long()]), name
    assert all(weight.grad is None for weight in (tensor.weight for tensor in neurons.attached))


def test_gradient_checkpointing(kind: str):
    """Non-reentrant: the forward is computed again in the backward; gradients identical to the bit."""
    model = make_model(kind)
    neurons = attach(model, random_selection(model))
    model.train()
    nll(0)(model).backward()
    expected = gradients(neurons)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # pyright: ignore
    nll(0)(model).backward()
    for name, gradient in gradients(neurons).items():
        assert torch.equal(gradient, expected[name]), name


def test_two_forwards_before_one_backward(kind: str):
    """As in DPO: chosen and rejected by two calls, one loss; equal to both rows in one call."""
    model = make_model(kind)
    neurons = attach(model, random_selection(model))

    def log_probs(ids: Tensor) -> Tensor:
        logits = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        return logits.gather(-1, ids[:, 1:, None]).sum((1, 2))

    ids = tokens(0, rows=2)
    chosen, rejected = log_probs(ids)
    (-nn.functional.logsigmoid(0.1 * (chosen - rejected))).backward()
    joint = gradients(neurons)
    chosen = log_probs(ids[:1])
    neurons.write()  # even a write between the two does not invalidate the first
    rejected = log_probs(ids[1:])
    (-nn.functional.logsigmoid(0.1 * (chosen - rejected))).sum().backward()
    for name, gradient in gradients(neurons).items():
        torch.testing.assert_close(gradient, joint[name], rtol=1e-4, atol=1e-6)


def test_accumulation_is_in_float32():
    """bf16 weights: each backward's bf16 gradient is added to float32 `values.grad` without rounding the sum."""
    model = make_model("llama", torch.bfloat16)
    neurons = attach(model, random_selection(model))
    parts = []
    for seed in range(3):
        nll(seed)(model).backward()
        parts.append(gradients(neurons))
    for seed in range(3):
        nll(seed)(model).backward()
    for name, gradient in gradients(neurons).items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, parts[0][name] + parts[1][name] + parts[2][name])


def test_bf16_weights_with_float32_values():
    """Steps far below a bf16 ulp add up in the values; the weights are always their cast."""
    model = make_model("llama", torch.bfloat16)
    selection = random_selection(model)
    start = weights_of(model)
    neurons = attach(model, selection)
    before = {name: values.detach().clone() for name, values in neurons.named_values()}
    optimizer = torch.optim.AdamW(neurons.parameters(), lr=1e-6)
    for _ in range(3):
        nll(0)(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        neurons.write()
    changed = sum(int((values != before[name]).sum()) for name, values in neurons.named_values())
    assert changed > 0.9 * selection.count
    for tensor in neurons.attached:
        assert tensor.weight.dtype == torch.bfloat16
        flat, mask = tensor.weight.view(-1), mask_of(selection, tensor.name)
        assert torch.equal(flat[mask], tensor.entries.values.bfloat16())
        assert torch.equal(flat[~mask], start[tensor.name].view(-1)[~mask])


@pytest.mark.parametrize("stream", [True, False])
def test_masters(kind: str, stream: bool):
    """float32 masters give the values uncast, and replace the weights, also where nothing is selected."""
    model = make_model(kind, torch.bfloat16)
    selection = random_selection(model)
    last = selection.names[-1]
    del selection.indices[last]
    masters = {
        name: torch.randn(weight.shape, generator=torch.Generator().manual_seed(7))
        for name, weight in floating_parameters(model)
    }
    neurons = attach(model, selection, iter(masters.items()) if stream else masters)
    for name, values in neurons.named_values():
        assert torch.equal(values, masters[name].view(-1)[selection.indices[name].long()])
    neurons.detach()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, masters[name].bfloat16()), name


def test_tensors_without_a_selected_neuron_cost_nothing():
    """No parametrization, no gradient; a selection in the second layer leaves the first without backward."""
    model = make_model("llama")
    selection = random_selection(model)
    for name in list(selection.indices):
        if "layers.1.mlp" not in name:
            del selection.indices[name]
    neurons = attach(model, selection)
    assert len(neurons.parameters()) == 3
    assert not hasattr(model.model.layers[0].mlp.up_proj, "parametrizations")  # pyright: ignore
    loss = nll(0)(model)
    loss.backward()
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trainable) == 3
    assert neurons.count == sum(values.numel() for values in neurons.parameters())


def test_dense_gradients_live_for_one_layer_only(monkeypatch: pytest.MonkeyPatch):
    """When a weight's gradient arrives at the gather, that of the weight before is gone already."""
    from allo_ray.neurons import handover

    model = make_model("qwen")
    neurons = attach(model, random_selection(model))
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    gather = handover.Handover.backward

    def watched(ctx: object, *gradients: Tensor) -> tuple:
        nonlocal most
        alive[:] = [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(gradients[0]))
        most = max(most, len(alive))
        return gather(ctx, *gradients)

    monkeypatch.setattr(handover.Handover, "backward", staticmethod(watched))
    gc.disable()
    try:
        nll(0)(model).backward()
    finally:
        gc.enable()
    assert most == 1
    assert len(neurons.parameters()) == 27


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("dense", [True, False])
def test_write_shard(workers: int, dense: bool):
    """Slices of the flat weight, the last one padded, put together equal the whole weight after `write`."""
    model = make_model("qwen", torch.bfloat16)
    neurons = attach(model, Selection.of_model(model) if dense else random_selection(model))
    for values in neurons.parameters():
        values.data += 0.5
    for tensor in neurons.attached:
        flat = tensor.weight.view(-1)
        length = -(-len(flat) // workers)
        padded = torch.cat([flat.detach(), torch.zeros(length * workers - len(flat), dtype=flat.dtype)])
        shards = [padded[rank * length : (rank + 1) * length].clone() for rank in range(workers)]
        for rank, shard in enumerate(shards):
            neurons.write_shard(tensor.name, tensor.entries.values.data, shard, rank * length)
        neurons.write()
        assert torch.equal(torch.cat(shards)[: len(flat)], flat), tensor.name


def test_load_values(kind: str):
    """What a checkpoint holds comes back, in the values and in the weights."""
    model = make_model(kind)
    neurons = attach(model, random_selection(model))
    kept = {name: values.detach().clone() for name, values in neurons.named_values()}
    weights = {tensor.name: tensor.weight.detach().clone() for tensor in neurons.attached}
    train(neurons, [nll(0)], steps=2)
    neurons.load_values(kept)
    for tensor in neurons.attached:
        assert torch.equal(tensor.entries.values, kept[tensor.name])
        assert torch.equal(tensor.weight, weights[tensor.name])


def test_another_model():
    selection = random_selection(make_model("qwen"))
    with pytest.raises(UserError, match=r"q_proj\.bias of shape \(32,\), the model has no such tensor"):
        attach(make_model("llama"), selection)
