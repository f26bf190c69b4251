"""Norms and gated activations that keep less for the backward pass.

transformers' RMS norm keeps two float32 copies of its input, its gated unit the activated gate and the product. Here
the backward pass computes these again from what is kept anyway: about half the activation memory of a Llama layer, and
fewer passes over it. A module is replaced only where both forms answer with the same bits on a random input, so a
model that does something else keeps its own code.

Shapes: T tokens, E hidden size, F width of the gated unit.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class _RmsNorm(torch.autograd.Function):
    """weight * (x / rms(x)).to(x.dtype), the quotient in float32. x [..., E], weight [E]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        upstream = gradients[0]
        normal = x.float() * scale
        for_weight = None
        if ctx.needs_input_grad[1]:
            for_weight = (upstream * normal.to(x.dtype)).flatten(0, -2).sum(0)
        slope = (upstream * weight).float()
        inner = (slope * normal).mean(-1, keepdim=True)
        return slope.sub_(normal.mul_(inner)).mul_(scale).to(x.dtype), for_weight, None


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up, both [..., F]."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        upstream = gradients[0]
        for_gate = torch.ops.aten.silu_backward(upstream * up, gate)
        return for_gate, functional.silu(gate).mul_(upstream)


def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return _RmsNorm.apply(hidden_states, self.weight, self.variance_epsilon)  # pyright: ignore[reportReturnType]


def _gated(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(_GatedSilu.apply(self.gate_proj(x), self.up_proj(x)))


def fuse(model: nn.Module) -> int:
    """Replaces what can be replaced; returns how many modules that were."""
    count = 0
    module: Any
    for module in model.modules():
        if isinstance(getattr(module, "variance_epsilon", None), float) and hasattr(module, "weight"):
            count += _replace(module, _norm, module.weight.shape[0])
        elif all(
            isinstance(getattr(module, name, None), nn.Linear)
            for name in ("gate_proj", "up_proj", "down_proj")
        ):
            count += _replace(module, _gated, module.gate_proj.in_features)
    return count


@torch.no_grad()
def _replace(module: nn.Module, forward: Any, width: int) -> bool:
    weight = next(module.parameters())
    drawn = torch.randn(1, 8, width, generator=torch.Generator().manual_seed(0))
    sample = drawn.to(weight.device, weight.dtype)
    if not torch.equal(module(sample), forward(module, sample)):
        return False
    module.forward = MethodType(forward, module)
    return True
