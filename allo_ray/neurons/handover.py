"""The way of a gradient from a weight to its selected neurons, without ever being whole where that is large.

Most gradients come dense, [N_t], and die as soon as their selected entries are gathered. The two largest of a model are
never made: an embedding's has the rows of a batch's tokens alone (sparse), and a head gives its own in blocks of rows.
With a vocabulary of 128k and a width of 4096 each would be 1 GB in bf16.

Shapes: N_t neurons of tensor t, K_t selected ones, at sorted flat indices. V rows of an embedding or a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Handover(torch.autograd.Function):
    """Hands W on; sends the gradient of W, gathered and in float32, to `values`.

    values float32 [K_t], weight of any shape, indices [K_t] or None (dense) -> an alias of the weight.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, indices: Tensor | None) -> Tensor:
        ctx.indices, ctx.gathered = indices, None
        # An alias with its own version counter: writing W between two forwards does not invalidate the first one.
        return weight.data

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        (gradient,), gathered, ctx.gathered = gradients, ctx.gathered, None
        if gradient.is_sparse:
            found = _of_rows(gradient, ctx.indices)
        elif gathered is not None and not any(gradient.stride()):
            return gathered, None, None  # nothing but `BlockGradient.whole`
        else:
            flat = gradient.reshape(-1)
            found = (flat if ctx.indices is None else flat.index_select(0, ctx.indices)).float()
        return found if gathered is None else found + gathered, None, None


def _of_rows(gradient: Tensor, indices: Tensor) -> Tensor:
    """The selected entries, float32 [K_t], of a sparse gradient [V, E] with some of its rows."""
    gradient = gradient.float().coalesce()
    rows, dense = gradient.indices()[0], gradient.values()
    width = dense.shape[1]
    # The selected entries of a row are a range of the sorted indices.
    low, high = torch.searchsorted(indices, (torch.stack([rows, rows + 1]) * width).to(indices.dtype))
    counts = high - low
    row = torch.repeat_interleave(counts)
    at = torch.arange(len(row), device=row.device) + (low - (counts.cumsum(0) - counts))[row]
    out = torch.zeros(len(indices), dtype=torch.float32, device=indices.device)
    out[at] = dense[row, indices[at] - rows[row] * width]
    return out


def block_node(weight: Tensor) -> Any:
    """What takes the gradient of an alias in blocks, for `BlockGradient`; None where it has to come whole."""
    node: Any = weight.grad_fn
    while type(node).__name__.startswith(
        "PreBackwardFunctionForModule"
    ):  # of ZeRO 3: hands gradients on as they are
        node = node.next_functions[0][0]
    return node if isinstance(node, Handover._backward_cls) and node.indices is not None else None  # pyright: ignore


class BlockGradient:
    """The gradient of an alias [V, E] in blocks of rows.

    A backward pass that adds the blocks returns `whole`, which is zero and takes no memory, as the gradient itself.
    """

    def __init__(self, node: Any, weight: Tensor, rows: int) -> None:
        """node: of `block_node`; rows: of every block but the last, which may be smaller."""
        self._indices: Tensor = node.indices
        step, size = rows * weight.shape[1], weight.numel()
        self._starts = [*range(0, size, step), size]
        starts = torch.tensor(self._starts, device=self._indices.device).to(self._indices.dtype)
        self._bounds = torch.searchsorted(self._indices, starts).tolist()
        if node.gathered is None:
            node.gathered = torch.zeros(len(self._indices), device=self._indices.device)
        self._gathered: Tensor = node.gathered
        self.whole = weight.new_zeros(()).expand_as(weight)

    def add(self, number: int, block: Tensor) -> None:
        """Adds block `number`, [rows, E]."""
        low, high = self._bounds[number : number + 2]
        within = self._indices[low:high] - self._starts[number]
        self._gathered[low:high] += block.reshape(-1).index_select(0, within)
