"""Packs rows into micro-batches in which no token is computed twice and none is padding.

A row is a tree of tokens: the prompt and whatever both responses share at their start are the trunk, the rest of the
chosen and of the rejected response are two branches. Positions of a branch go on from the end of the trunk, and a token
attends to its own branch and the trunk only, so every hidden state equals that of the sequence computed alone. The last
token of a response is never read by the model: nothing follows it. What the prompts of all rows begin with (an
instruction, worked examples) is computed once for the whole micro-batch, as a preamble that every tree attends to.

The preamble and all trees lie one after the other in one row of T tokens, on which the linear layers work. Only the
attention sees the trees as a grid of one tree a line (attention.py).

Shapes: T packed tokens, C tokens of the preamble, G trees, L tokens of the longest tree, R response tokens,
U distinct (state, target) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from allo_ray.train.rows import Row, Side

#: A shorter common beginning is left in the trees: sharing it saves less than the extra attention call costs.
SHORTEST_PREAMBLE = 8


@dataclass(frozen=True)
class Grid:
    """How attention sees the packed row."""

    #: [T - C] int64: the cell of each token after the preamble in the grid [G, L], flattened.
    cells: torch.Tensor
    #: [G, 1, L, L] bool: query (second last) may attend to key (last). Padding attends to itself.
    allowed: torch.Tensor
    #: [G, L] int64: position of each cell's token, for sliding windows.
    positions: torch.Tensor
    #: C, tokens at the start of the row that every tree attends to.
    preamble: int = 0

    @cached_property
    def bias(self) -> torch.Tensor:
        """[G, 1, L, L] float32, to be added to scores: 0 where allowed, else minus infinity."""
        return torch.zeros(self.allowed.shape, device=self.allowed.device).masked_fill_(
            ~self.allowed, -torch.inf
        )


@dataclass(frozen=True)
class Packed:
    """One micro-batch. Log-probs are float32 in nats."""

    #: Ids of the rows, in order.
    ids: tuple[str, ...]
    #: [T] int64.
    tokens: torch.Tensor
    #: [T] int64, from 0 in every sequence.
    positions: torch.Tensor
    grid: Grid
    #: [U] int64 into T: the state that predicts; [U] int64: the id it has to predict.
    states: torch.Tensor
    targets: torch.Tensor
    #: [R] int64 into U, or -1 where the token has weight zero and gets no head.
    source: torch.Tensor
    #: [R] float32; zeros where the row has none.
    reference: torch.Tensor
    #: [R] float32.
    weight: torch.Tensor
    #: [R] int64: 2i chosen and 2i+1 rejected of pair i; i for one-sided methods.
    sequence: torch.Tensor
    sequences: int

    def to(self, device: torch.device) -> Packed:
        """The same micro-batch on another device."""
        if device.type == "cpu":
            return self
        return replace(_moved(self, device), grid=_moved(self.grid, device))


def _moved(part: Any, device: torch.device) -> Any:
    tensors = {
        f.name: value for f in fields(part) if isinstance(value := getattr(part, f.name), torch.Tensor)
    }
    return replace(part, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


def pack(rows: Sequence[Row], side: Side) -> Packed:
    """Packs rows into one micro-batch.

    Every token of weight zero keeps its place in `weight` and `sequence`, but no head is computed for it.
    """
    assert rows, "an empty micro-batch has nothing to pack"
    preamble = _preamble(rows)
    trees = [_tree(row, side, preamble) for row in rows]
    lengths = np.array([len(tree.tokens) for tree in trees])
    starts = preamble + np.concatenate([[0], np.cumsum(lengths)[:-1]])
    longest = int(lengths.max())
    tokens = np.concatenate([rows[0].prompt[:preamble], *(tree.tokens for tree in trees)])
    positions = np.concatenate([np.arange(preamble), *(tree.positions for tree in trees)])
    cells = np.concatenate([at * longest + np.arange(length) for at, length in enumerate(lengths)])
    # Padding belongs to branch -1 of its own: it attends to nothing but itself.
    branch = np.full((len(rows), longest), -1, dtype=np.int64)
    grid_positions = np.zeros((len(rows), longest), dtype=np.int64)
    for at, tree in enumerate(trees):
        branch[at, : len(tree.tokens)] = tree.branch
        grid_positions[at, : len(tree.tokens)] = tree.positions
    query, key = branch[:, :, None], branch[:, None, :]
    causal = np.tril(np.ones((longest, longest), dtype=bool))
    allowed = (((query == key) | ((key == 0) & (query > 0))) & (query >= 0) & causal) | np.eye(
        longest, dtype=bool
    )

    heads: dict[tuple[int, int], int] = {}
    source, reference, weight, sequence = [], [], [], []
    for at, (row, tree, start) in enumerate(zip(rows, trees, starts, strict=True)):
        for index, (ids, states) in enumerate(zip(row.responses(side), tree.states, strict=True)):
            weights, references = (
                _weights(row, side, index, len(ids)),
                _references(row, side, index, len(ids)),
            )
            for token, state, kept in zip(ids.tolist(), states.tolist(), weights.tolist(), strict=True):
                source.append(heads.setdefault((state + start, token), len(heads)) if kept else -1)
            reference.append(references)
            weight.append(weights)
            number = 2 * at + index if side == "pair" else at
            sequence.append(np.full(len(ids), number, dtype=np.int64))
    keys = np.array(list(heads), dtype=np.int64).reshape(-1, 2)
    return Packed(
        ids=tuple(row.id for row in rows),
        tokens=torch.from_numpy(tokens.astype(np.int64)),
        positions=torch.from_numpy(positions.astype(np.int64)),
        grid=Grid(
            cells=torch.from_numpy(cells),
            allowed=torch.from_numpy(allowed[:, None]),
            positions=torch.from_numpy(grid_positions),
            preamble=preamble,
        ),
        states=torch.from_numpy(keys[:, 0].copy()),
        targets=torch.from_numpy(keys[:, 1].copy()),
        source=torch.tensor(source, dtype=torch.int64),
        reference=torch.from_numpy(np.concatenate(reference)),
        weight=torch.from_numpy(np.concatenate(weight)),
        sequence=torch.from_numpy(np.concatenate(sequence)),
        sequences=len(rows) * (2 if side == "pair" else 1),
    )


def _preamble(rows: Sequence[Row]) -> int:
    """C: how many tokens all prompts share at their start. Every tree keeps a token of its prompt: the first state."""
    if len(rows) == 1:
        return 0
    prompts = [row.prompt for row in rows]
    shared = min(len(prompt) - 1 for prompt in prompts)
    for prompt in prompts[1:]:
        shared = _common(prompts[0][:shared], prompt)
    return shared if shared >= SHORTEST_PREAMBLE else 0


@dataclass(frozen=True)
class _Tree:
    """A row without the preamble; positions still count it."""

    tokens: np.ndarray
    positions: np.ndarray
    #: 0 trunk, 1 and 2 branches.
    branch: np.ndarray
    #: For each response, the index in `tokens` of the state that predicts each of its tokens.
    states: list[np.ndarray]


def _tree(row: Row, side: Side, preamble: int) -> _Tree:
    responses = row.responses(side)
    prompt = row.prompt[preamble:]
    read = [ids[:-1] for ids in responses]
    shared = _common(read[0], read[1]) if len(read) == 2 else 0
    trunk = np.concatenate([prompt, read[0][:shared]])
    parts, positions, branch, states = [trunk], [np.arange(len(trunk))], [np.zeros(len(trunk), np.int64)], []
    end = len(trunk)
    for number, ids in enumerate(read, start=1):
        own = ids[shared:]
        parts.append(own)
        positions.append(len(trunk) + np.arange(len(own)))
        branch.append(np.full(len(own), number, np.int64))
        states.append(np.concatenate([np.arange(len(prompt) - 1, len(trunk)), end + np.arange(len(own))]))
        end += len(own)
    return _Tree(np.concatenate(parts), preamble + np.concatenate(positions), np.concatenate(branch), states)


def _common(first: np.ndarray, second: np.ndarray) -> int:
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length


def _weights(row: Row, side: Side, index: int, length: int) -> np.ndarray:
    rejected = side == "rejected" or (side == "pair" and index == 1)
    if not rejected or len(row.rejected_weight) == 0:
        return np.ones(length, dtype=np.float32)
    assert len(row.rejected_weight) == length, f"row {row.position}: weights and tokens differ in number"
    return row.rejected_weight


def _references(row: Row, side: Side, index: int, length: int) -> np.ndarray:
    rejected = side == "rejected" or (side == "pair" and index == 1)
    values = row.rejected_reference if rejected else row.chosen_reference
    if len(values) == 0:
        return np.zeros(length, dtype=np.float32)
    assert len(values) == length, f"row {row.position}: reference log-probs and tokens differ in number"
    return values
