"""Modules that keep less for the backward pass answer with the same bits, and with the same gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from allo_ray.train.fused import fuse


def plain_and_fused(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, int]:
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval() for _ in range(2)]
    return models[0], models[1], fuse(models[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_and_gradients(folder: Path, dtype: torch.dtype) -> None:
    """Two layers: 2 norms and a gated unit each, and the last norm, are 7 modules."""
    plain, fused, count = plain_and_fused(folder, dtype)
    assert count == 7
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    answers = [model(ids).logits for model in (plain, fused)]
    assert torch.equal(*answers)
    slopes = torch.randn(answers[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for answer in answers:
        (answer * slopes).sum().backward()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for (name, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        distance = float((one.grad - other.grad).norm() / one.grad.norm())
        assert distance < tolerance, name


def test_a_module_that_does_something_else_is_left_alone() -> None:
    class OffsetNorm(nn.Module):
        """Scales by 1 + weight, as Gemma does."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((16,), 0.5))
            self.variance_epsilon = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (
                x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)
            )

    assert fuse(OffsetNorm()) == 0
