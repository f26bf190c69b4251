"""Small models with the structures that matter here, and what dense training with masked gradients gives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from allo_ray.neurons.selection import Selection, floating_parameters

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "attention_dropout": 0.0,
}
KINDS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, hidden_dropout=0.0, tie_word_embeddings=False)),
}


def make_model(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights at every call; biases and norms are not left at 0 and 1."""
    torch.manual_seed(0)
    model = KINDS[kind]()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight += 0.1 * torch.randn_like(weight)
    return model.to(dtype)


def random_selection(model: nn.Module, share: float = 0.1) -> Selection:
    """A share of every tensor, at least one neuron."""
    random = torch.Generator().manual_seed(1)
    weights = dict(floating_parameters(model))
    indices = {}
    for name, weight in weights.items():
        count = max(1, round(share * weight.numel()))
        indices[name] = torch.randperm(weight.numel(), generator=random)[:count].sort().values.int()
    return Selection(list(weights), {name: tuple(weight.shape) for name, weight in weights.items()}, indices)


def tokens(seed: int, rows: int = 3) -> Tensor:
    return torch.randint(0, 101, (rows, 12), generator=torch.Generator().manual_seed(seed))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def mask_of(selection: Selection, name: str) -> Tensor:
    """bool [N_t]: which neurons of a tensor are selected."""
    mask = torch.zeros(selection.size_of(name), dtype=torch.bool)
    if name in selection.indices:
        mask[selection.indices[name].long()] = True
    return mask | selection.dense


def train_masked(
    model: nn.Module,
    selection: Selection,
    losses: list[Callable[[nn.Module], Tensor]],
    steps: int,
    **adam: float,
) -> None:
    """The definition: dense AdamW with gradients, updates and weight decay masked to the selection.

    Args:
        losses: their gradients are added up in each step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), **adam)  # pyright: ignore
    start = weights_of(model)
    for _ in range(steps):
        for loss in losses:
            loss(model).backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None
            weight.grad.view(-1)[~mask_of(selection, name)] = 0
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                outside = ~mask_of(selection, name)
                weight.view(-1)[outside] = start[name].view(-1)[outside]
