"""Builders shared by the tests of the training core: random rows, a policy, an updater, a tenth of the neurons."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from allo_ray.config.train import TrainConfig
from allo_ray.neurons.parametrize import attach
from allo_ray.neurons.selection import Selection
from allo_ray.train.forward import Policy, load_model
from allo_ray.train.logprobs import logprobs_of
from allo_ray.train.rows import Row
from allo_ray.train.updater import PlainUpdater

NONE = np.zeros(0, dtype=np.float32)


def random_rows(count: int, seed: int = 0) -> list[Row]:
    """Pairs of ids under 300 whose responses often begin alike; no references, no weights."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(3, 300, rng.integers(low, high)).astype(np.int32)

    rows = []
    for at in range(count):
        prompt, chosen, rejected = ids(3, 20), ids(1, 12), ids(1, 12)
        alike = int(min(len(chosen), len(rejected), rng.integers(0, 4)))
        rejected[:alike] = chosen[:alike]
        rows.append(Row(at, f"row{at}", prompt, chosen, rejected, NONE, NONE, NONE))
    return rows


def overflowing(row: Row) -> Row:
    """A row with references of the start model, whose loss under beta 100 is finite and whose gradient is not.

    The first rejected token gets the log-ratio 0.01 and the weight 1e38: the loss is 100 * 1e38 * 0.01 = 1e38, its
    slope 100 * 1e38 = 1e40, and float32 ends at 3.4e38.
    """
    weight = np.ones(len(row.rejected), dtype=np.float32)
    weight[0] = 1e38
    reference = row.rejected_reference.copy()
    reference[0] -= 0.01
    return replace(row, rejected_reference=reference, rejected_weight=weight)


def tenth(model: torch.nn.Module, seed: int = 1) -> Selection:
    """A random tenth of every tensor's neurons."""
    generator = torch.Generator().manual_seed(seed)
    dense = Selection.of_model(model)
    indices = {}
    for name in dense.names:
        size = dense.size_of(name)
        picked = torch.randperm(size, generator=generator)[: max(1, size // 10)]
        indices[name] = picked.sort().values.int()
    return replace(dense, indices=indices, dense=False, k=0.1, order="random")


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[Row]]:
    return random_rows


@pytest.fixture(scope="session")
def with_reference() -> Callable[[Path, list[Row]], list[Row]]:
    """Adds the model's own log-probs as the reference, as the stage before training does."""

    def add(folder: Path, rows: list[Row]) -> list[Row]:
        policy = Policy(load_model(folder, torch.float32))
        found, _ = logprobs_of(policy, rows, 10_000, torch.device("cpu"))
        return [
            replace(row, chosen_reference=chosen, rejected_reference=rejected)
            for row, (chosen, rejected) in zip(rows, found, strict=True)
        ]

    return add


@pytest.fixture(scope="session")
def make_updater() -> Callable[..., PlainUpdater]:
    """Plain torch over a tenth of the neurons (or all), in float32."""

    def make(folder: Path, config: TrainConfig, dense: bool = False) -> PlainUpdater:
        model = load_model(folder, torch.float32)
        neurons = attach(model, Selection.of_model(model) if dense else tenth(model))
        return PlainUpdater(Policy(model), neurons, config)

    return make


@pytest.fixture(params=["llama", "qwen"])
def folder(request: pytest.FixtureRequest) -> Path:
    """A tiny model: tied embeddings without biases, or untied with biases."""
    return request.getfixturevalue(f"tiny_{request.param}")
