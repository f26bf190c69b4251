"""Attention over packed trees: linear layers see one row without padding, attention a grid of one tree a line.

A preamble that all trees share comes first: it attends to itself, and its keys and values stand before every line.

Registered with transformers under the name `ATTENTION`; the grid travels through the model's keyword arguments, so it
also reaches the recomputation of gradient checkpointing. Scores of different trees are never computed: the work is
G*L^2, not T^2.

Two ways to compute it. torch's scaled_dot_product_attention, everywhere; and for short trees in bf16 on the CPU, where
that spends its time on overhead, `ShortTrees`: batched matrix products whose backward pass recomputes the
probabilities (measured on one core, 9 heads of 64 channels, 8 trees, forward and backward: 64 tokens 6 ms against 13,
216 tokens 51 against 70).

Shapes: T packed tokens, C of them the preamble, G trees, L tokens of the longest tree, H query heads, J key and value
heads, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from allo_ray.errors import UserError
from allo_ray.train.batching import Grid

ATTENTION = "allo_trees"
#: Longest tree for which `ShortTrees` is used; its scores take G*H*L^2 floats at a time.
SHORT = 256


def to_cells(packed: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[T, ...] -> [G, L, ...], zeros where there is no token."""
    cells = packed.new_zeros((grid.positions.numel(), *packed.shape[1:]))
    return cells.index_copy_(0, grid.cells, packed).view(*grid.positions.shape, *packed.shape[1:])


def from_cells(cells: torch.Tensor, grid: Grid) -> torch.Tensor:
    """[G, L, ...] -> [T, ...], the inverse of `to_cells`."""
    return cells.reshape(-1, *cells.shape[2:]).index_select(0, grid.cells)


class _ToCells(torch.autograd.Function):
    """`to_cells` whose gradient is a plain copy: no index_add."""

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor, grid: Grid) -> torch.Tensor:
        ctx.grid = grid
        return to_cells(packed, grid)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return from_cells(gradients[0], ctx.grid), None


class _FromCells(torch.autograd.Function):
    """`from_cells`, likewise."""

    @staticmethod
    def forward(ctx: Any, cells: torch.Tensor, grid: Grid) -> torch.Tensor:
        ctx.grid = grid
        return from_cells(cells, grid)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return to_cells(gradients[0], ctx.grid), None


class ShortTrees(torch.autograd.Function):
    """Attention of short trees: query [T, H, D], key and value [T, J, D] -> [T, H, D].

    Scores and softmax are float32; products with probabilities take the inputs' dtype, as flash attention does. Query
    heads that share a key head are stacked, so that keys and values are not repeated.
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: Grid, scale: float
    ) -> torch.Tensor:
        stacked = [_stack(heads, grid, key.shape[1]) for heads in (query, key, value)]
        weights = _probabilities(stacked[0], stacked[1], grid, scale).to(value.dtype)
        out = _unstack(torch.bmm(weights, stacked[2]), grid, query.shape[1])
        ctx.save_for_backward(query, key, value, out)
        ctx.grid, ctx.scale = grid, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        query, key, value, out = ctx.saved_tensors
        grid, scale = ctx.grid, ctx.scale
        queries, keys, values, upstream = (
            _stack(x, grid, key.shape[1]) for x in (query, key, value, gradients[0])
        )
        weights = _probabilities(queries, keys, grid, scale)
        # d softmax: p * (dp - sum(p * dp)), where the sum is that of out * d out over the channels of a head.
        inner = _stack((gradients[0].float() * out.float()).sum(-1, keepdim=True), grid, key.shape[1])
        slopes = torch.bmm(upstream, values.transpose(1, 2)).float().sub_(inner).mul_(weights).to(query.dtype)
        for_value = torch.bmm(weights.to(value.dtype).transpose(1, 2), upstream)
        for_query = torch.bmm(slopes, keys).mul_(scale)
        for_key = torch.bmm(slopes.transpose(1, 2), queries).mul_(scale)
        return (
            _unstack(for_query, grid, query.shape[1]),
            _unstack(for_key, grid, key.shape[1]),
            _unstack(for_value, grid, key.shape[1]),
            None,
            None,
        )


def _stack(heads: torch.Tensor, grid: Grid, groups: int) -> torch.Tensor:
    """[T, H, D] -> [G*J, H/J*L, D] with J = `groups`: the query heads of a key head one below the other."""
    trees, length = grid.positions.shape
    cells = to_cells(heads, grid).view(trees, length, groups, heads.shape[1] // groups, heads.shape[2])
    return cells.permute(0, 2, 3, 1, 4).reshape(trees * groups, -1, heads.shape[2])


def _unstack(stacked: torch.Tensor, grid: Grid, heads: int) -> torch.Tensor:
    """[G*J, H/J*L, D] -> [T, H, D]."""
    trees, length = grid.positions.shape
    cells = stacked.view(trees, heads, length, -1).transpose(1, 2)
    return from_cells(cells, grid)


def _probabilities(queries: torch.Tensor, keys: torch.Tensor, grid: Grid, scale: float) -> torch.Tensor:
    """Softmax of scores, float32 [G*J, H/J*L, L]."""
    trees, length = grid.positions.shape
    scores = torch.bmm(queries.float() * scale, keys.float().transpose(1, 2))
    scores.view(trees, -1, length, length).add_(grid.bias)
    return torch.softmax(scores, dim=-1)


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
    """transformers' attention interface: query [1, H, T, D], key and value [1, J, T, D] -> [1, T, H, D].

    Raises:
        UserError: the model does not hand the grid on, or its attention has a part that is not built here.
    """
    kind = type(module).__name__
    if grid is None:
        raise UserError(
            f"{kind} passes no keyword arguments to its attention: this model cannot be trained here."
        )
    for part in ("softcap", "s_aux", "position_bias"):
        if extra.get(part) is not None:
            raise UserError(f"{kind} has '{part}' in its attention, which training does not build.")
    query, key, value = (heads[0].transpose(0, 1) for heads in (query, key, value))
    trees, length = grid.positions.shape
    window = len(query) if sliding_window is None else sliding_window
    first = grid.preamble
    short = length <= SHORT and query.dtype == torch.bfloat16 and query.device.type == "cpu" and not first
    if short and window >= length and key.shape[-1] == value.shape[-1]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return ShortTrees.apply(query, key, value, grid, scale)[None], None  # pyright: ignore[reportOptionalSubscript]
    options: Any = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    allowed, places = grid.allowed, grid.positions
    cells = [_ToCells.apply(heads[first:], grid).transpose(1, 2) for heads in (query, key, value)]  # pyright: ignore
    if first:
        start = torch.arange(first, device=query.device)
        head = [heads[:first].transpose(0, 1)[None] for heads in (query, key, value)]
        before = _within(start[None], start[None], window) & (start[:, None] >= start)
        opening = scaled_dot_product_attention(*head, attn_mask=before, **options)
        cells[1:] = [
            torch.cat([part.expand(trees, -1, -1, -1), own], 2)
            for part, own in zip(head[1:], cells[1:], strict=True)
        ]
        places = torch.cat([start.expand(trees, -1), places], 1)
        allowed = torch.cat([allowed.new_ones(()).expand(trees, 1, length, first), allowed], -1)
    if window < first + length:
        allowed = allowed & _within(grid.positions, places, window)[:, None]
    out = scaled_dot_product_attention(*cells, attn_mask=allowed, **options)
    packed: Any = _FromCells.apply(out.transpose(1, 2), grid)
    return torch.cat([opening[0].transpose(0, 1), packed])[None] if first else packed[None], None


def _within(query: torch.Tensor, key: torch.Tensor, window: int) -> torch.Tensor:
    """[G, Q] and [G, K] positions -> [G, Q, K] bool: closer than the window."""
    return query[:, :, None] - key[:, None, :] < window


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def register() -> None:
    """Makes `ATTENTION` known to transformers; may be called many times."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, tree_attention)
    # Without an entry of its own here transformers would build a causal mask over the packed row.
    AttentionMaskInterface.register(ATTENTION, _no_mask)
