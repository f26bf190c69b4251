"""Importances measured once: any k is cut from their files, at the memory of two tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from allo_ray.errors import UserError
from allo_ray.neurons import delta
from allo_ray.neurons.importance import Ranked
from allo_ray.neurons.masters import Masters
from allo_ray.neurons.ranked_files import RankedFiles, map_shard, write_shard
from allo_ray.neurons.select import select
from allo_ray.neurons.selection import Selection

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


@pytest.mark.parametrize("remote", [False, True], ids=["folder", "URL"])
def test_any_k_equals_topk(
    remote: bool, tiny_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two shards and an index, written once, give for every k the importances of torch.topk over all tensors.

    Behind a URL models and importances alike are read by byte range.
    """
    monkeypatch.setenv("ALLO_RAY_CACHE", str(tmp_path / "cache"))
    plain = Masters(tiny_qwen)
    random = torch.Generator().manual_seed(0)
    moved = {name: weight + 1e-4 * torch.randn(weight.shape, generator=random) for name, weight in plain}
    delta.from_values(moved, Selection.all(plain.names, plain.shapes)).save(tmp_path / "tuned.safetensors")
    place, files = str(tmp_path), fsspec.filesystem("memory")
    if remote:
        place = f"memory://{tmp_path.name}"
        files.put(str(tiny_qwen), f"{place}/base", recursive=True)
        files.put_file(str(tmp_path / "tuned.safetensors"), f"{place}/tuned.safetensors")
    base = f"{place}/base" if remote else tiny_qwen
    before, after = Masters(base), Masters(base, [f"{place}/tuned.safetensors"], plain.stored.parameters)

    out, names = tmp_path / "out", before.names
    cut = len(names) // 2
    shards = {"a.safetensors": names[:cut], "b.safetensors": names[cut:]}
    counted = [one for file, part in shards.items() for one in write_shard(out / file, before, after, part)]
    RankedFiles(counted, {name: file for file, part in shards.items() for name in part}, "f00d").save(out)
    folder = f"{place}/out"
    if remote:
        files.put(str(out), folder, recursive=True)
    read = RankedFiles.load(folder)
    assert read.base == "f00d"

    def mapper(function: Callable[[Ranked], Any], asked: Collection[str]) -> list[Any]:
        return [map_shard(function, f"{folder}/{read.shards[name]}", [name])[0] for name in asked]

    importances = {name: (moved[name] - weight).abs().view(-1) for name, weight in plain}
    whole = torch.cat(list(importances.values()))
    for k in (1e-4, 0.01, 0.137, 0.5, 0.99):
        [selection] = select(read.counted, mapper, [k])
        best = torch.topk(whole, round(k * len(whole))).values
        chosen = torch.cat([importances[name][found.long()] for name, found in selection.indices.items()])
        assert torch.equal(chosen.sort().values, best.sort().values)


def test_foreign_files(tmp_path: Path) -> None:
    for folder in (str(tmp_path), f"memory://{tmp_path.name}-none"):
        with pytest.raises(
            UserError, match=r"index\.safetensors: cannot be read as the index of importances"
        ):
            RankedFiles.load(folder)


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    told = [sys.executable, "-m", "tests.neurons.peak", str(tmp_path_factory.mktemp("peak"))]
    return json.loads(subprocess.run(told, cwd=ROOT, check=True, timeout=300, stdout=subprocess.PIPE).stdout)


def test_locating_takes_two_tensors(peaks: dict[str, int]) -> None:
    """Measuring holds θ0 and θ' of one tensor (32 MiB each) and sorts a block of 2^19 neurons: 4 + 4 MiB of places and
    twice as much for other arrays and what the allocator keeps. Selecting 5 % of 29 million neurons holds 4 bytes for
    each: 6 MB, and twice that while they are put together.
    """
    assert peaks["exact"]
    assert 2 * peaks["tensor"] <= peaks["measure"] <= 2 * peaks["tensor"] + 32 * MIB
    assert peaks["select"] <= peaks["tensor"]


def test_export_never_holds_the_model(peaks: dict[str, int]) -> None:
    """One tensor is read while the one before is let go; the model is of three and a half."""
    assert peaks["model"] > 3 * peaks["tensor"]
    assert peaks["tensor"] <= peaks["export"] <= 2 * peaks["tensor"] + 8 * MIB
