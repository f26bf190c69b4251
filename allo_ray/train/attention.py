"""Attention over packed trees: linear layers see one row without padding, attention a grid of one tree a line.

Registered with transformers under the name `ATTENTION`; the grid travels through the model's keyword arguments, so it
also reaches the recomputation of gradient checkpointing. Scores of different trees are never computed: the work is
G*L^2, not T^2.

Shapes: T packed tokens, G trees, L tokens of the longest tree, H query heads, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from allo_ray.errors import UserError
from allo_ray.train.batching import Grid

ATTENTION = "allo_trees"


class _ToGrid(torch.autograd.Function):
    """[T, ...] -> [cells, ...], zeros where there is no token. Both directions are plain copies: no index_add."""

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor, cells: torch.Tensor, count: int) -> torch.Tensor:
        ctx.save_for_backward(cells)
        return packed.new_zeros((count, *packed.shape[1:])).index_copy_(0, cells, packed)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        (cells,) = ctx.saved_tensors
        return gradients[0].index_select(0, cells), None, None


class _FromGrid(torch.autograd.Function):
    """[cells, ...] -> [T, ...], the inverse of `_ToGrid`."""

    @staticmethod
    def forward(ctx: Any, grid: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cells)
        ctx.count = grid.shape[0]
        return grid.index_select(0, cells)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (cells,) = ctx.saved_tensors
        out = gradients[0].new_zeros((ctx.count, *gradients[0].shape[1:]))
        return out.index_copy_(0, cells, gradients[0]), None


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    grid: Grid | None = None,
    sliding_window: int | None = None,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, H, T, D], key and value [1, H', T, D] -> [1, T, H, D].

    Raises:
        UserError: the model does not hand the grid on, or its attention has a part that is not built here.
    """
    kind = type(module).__name__
    if grid is None:
        raise UserError(
            f"{kind} does not pass keyword arguments to its attention: this model cannot be trained here."
        )
    for part in ("softcap", "s_aux", "position_bias"):
        if extra.get(part) is not None:
            raise UserError(
                f"{kind} uses '{part}' in its attention, which training does not build: take another model."
            )
    trees, length = grid.positions.shape
    grids = [
        _ToGrid.apply(heads[0].transpose(0, 1), grid.cells, trees * length)
        .view(trees, length, heads.shape[1], heads.shape[3])
        .transpose(1, 2)
        for heads in (query, key, value)
    ]
    allowed = grid.allowed
    if sliding_window is not None:
        distance = grid.positions[:, :, None] - grid.positions[:, None, :]
        allowed = allowed & (distance < sliding_window)[:, None]
    out = scaled_dot_product_attention(
        *grids,
        attn_mask=allowed,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    out = out.transpose(1, 2).reshape(trees * length, query.shape[1], value.shape[3])
    return _FromGrid.apply(out, grid.cells)[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def register() -> None:
    """Makes `ATTENTION` known to transformers; may be called many times."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, tree_attention)
    # Without an entry of its own here transformers would build a causal mask over the packed row.
    AttentionMaskInterface.register(ATTENTION, _no_mask)
