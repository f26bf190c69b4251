"""Measuring importances and locating neurons as stages: by Ray tasks as in one process."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from allo_ray.config.load import load
from allo_ray.models import fingerprint
from allo_ray.neurons import delta
from allo_ray.neurons.masters import Masters
from allo_ray.neurons.selection import Selection
from allo_ray.pipeline import Node, run
from allo_ray.report.terminal import Progress
from allo_ray.stages import importance, locate
from allo_ray.stages.base import Context, Stage
from allo_ray.stages.importance import IMPORTANCE
from allo_ray.stages.locate import LOCATE
from allo_ray.store import Store, local_path

PLAIN = {"order": "top", "band": None, "include": None}


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_and_one_process_select_the_same(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tasks, of at most 20,000 neurons each, and one process give torch.topk, for two k and a random order alike."""
    plain = Masters(tiny_llama)
    random = torch.Generator().manual_seed(0)
    moved = {name: weight + 1e-4 * torch.randn(weight.shape, generator=random) for name, weight in plain}
    delta.from_values(moved, Selection.all(plain.names, plain.shapes)).save(tmp_path / "tuned.safetensors")
    layers = {"model": [], "warmup": [str(tmp_path / "tuned.safetensors")]}

    def given(ctx: Context) -> None:
        ctx.hand_on(str(tiny_llama), None, tuple(layers[ctx.settings["name"]]))

    nodes = [Node(name, Stage("given", 1, given), {"name": name}, {}) for name in layers]
    nodes.append(Node("importance", IMPORTANCE, {}, {"start": "model", "tuned": "warmup"}))
    asked = {"5 %": (0.05, PLAIN), "30 %": (0.3, PLAIN), "random": (0.1, {**PLAIN, "order": "random"})}
    for name, (k, options) in asked.items():
        settings = {"k": k, "locate": options, "seed": 0}
        nodes.append(Node(name, LOCATE, settings, {"importance": "importance"}))

    found: dict[str, dict[str, Selection]] = {}
    for how, few in (("tasks", 0), ("here", importance.HERE)):
        monkeypatch.setattr(importance, "GROUP", 20_000)
        monkeypatch.setattr(importance, "HERE", few)
        monkeypatch.setattr(locate, "HERE", few)
        done = run(load("qa"), nodes, Store(str(tmp_path / how)), Progress(Console(file=io.StringIO())))
        assert done["importance"].artifact.facts["shards"] >= 4
        found[how] = {
            name: Selection.load(local_path(done[name].artifact.file("selection.safetensors")))
            for name in asked
        }
    importances = {name: (moved[name] - weight).abs().view(-1) for name, weight in plain}
    whole = torch.cat(list(importances.values()))
    for name, (k, _) in asked.items():
        mine, other = found["tasks"][name], found["here"][name]
        assert mine.base == other.base == fingerprint(tiny_llama)
        assert mine.count == round(k * len(whole))
        assert mine.indices.keys() == other.indices.keys()
        assert all(torch.equal(mine.indices[tensor], other.indices[tensor]) for tensor in mine.indices)
        if name != "random":
            chosen = torch.cat(
                [importances[tensor][places.long()] for tensor, places in mine.indices.items()]
            )
            assert torch.equal(chosen.sort().values, torch.topk(whole, mine.count).values.flip(0))
