"""The selection's file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from allo_ray.errors import UserError
from allo_ray.neurons.selection import Selection

NAMES = ["a.weight", "b.weight", "c.weight"]
SHAPES = {"a.weight": (100, 10), "b.weight": (100, 10), "c.weight": (3,)}
INDICES = {"a.weight": torch.arange(0, 1000, 50).int(), "b.weight": torch.arange(0, 1000, 3).int()}


def test_round_trip(tmp_path: Path):
    selection = Selection(NAMES, SHAPES, INDICES, base="f00d", k=0.1, order="top")
    selection.save(tmp_path / "deep" / "selection.safetensors")
    read = Selection.load(tmp_path / "deep" / "selection.safetensors")
    assert (read.names, read.shapes, read.dense, read.base, read.k, read.order) == (
        NAMES,
        SHAPES,
        False,
        "f00d",
        0.1,
        "top",
    )
    assert list(read.indices) == ["a.weight", "b.weight"]
    for name, indices in INDICES.items():
        assert torch.equal(read.indices[name], indices)
        assert read.indices[name].dtype == torch.int32
    assert (read.count, read.total, read.count_of("c.weight")) == (20 + 334, 2003, 0)


def test_dense(tmp_path: Path):
    selection = Selection.all(NAMES, SHAPES)
    assert selection.count == selection.total == 2003
    selection.save(tmp_path / "all.safetensors")
    read = Selection.load(tmp_path / "all.safetensors")
    assert read.dense
    assert read.count == 2003
    assert (tmp_path / "all.safetensors").stat().st_size < 1000


def test_size_of_the_file(tmp_path: Path):
    """A tenth of 1,000,000 neurons takes about a byte each, not the four of plain indices."""
    indices = {
        "w": torch.randperm(1_000_000, generator=torch.Generator().manual_seed(0))[:100_000]
        .sort()
        .values.int()
    }
    Selection(["w"], {"w": (1_000_000,)}, indices, k=0.1).save(tmp_path / "s.safetensors")
    assert (tmp_path / "s.safetensors").stat().st_size < 102_000


def test_foreign_files(tmp_path: Path):
    with pytest.raises(UserError, match="cannot be read as a selection"):
        Selection.load(tmp_path / "missing.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="found a foreign safetensors file"):
        Selection.load(tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08")
    with pytest.raises(UserError, match="cannot be read"):
        Selection.load(tmp_path / "torn.safetensors")
