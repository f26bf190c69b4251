"""Deltas: stored, applied, inverted, stacked, compared, exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from allo_ray.errors import UserError
from allo_ray.models import fingerprint
from allo_ray.neurons import delta
from allo_ray.neurons.export import export
from allo_ray.neurons.masters import Masters, StoredModel, diff, invert, iter_masters
from allo_ray.neurons.parametrize import attach
from allo_ray.neurons.selection import Selection


@pytest.fixture(params=["tiny_llama", "tiny_qwen"])
def base(request: pytest.FixtureRequest) -> Path:
    """Folder of a bf16 model: tied embeddings, or untied with biases."""
    return request.getfixturevalue(request.param)


def selection_of(folder: Path, step: int, first: int = 0) -> Selection:
    """Every `step`-th neuron of every tensor."""
    stored = StoredModel(folder)
    indices = {}
    for name in stored.names:
        found = torch.arange(first, torch.Size(stored.shapes[name]).numel(), step, dtype=torch.int32)
        if len(found):
            indices[name] = found
    return Selection(stored.names, stored.shapes, indices, base=fingerprint(folder), k=1 / step)


def dense_selection(folder: Path) -> Selection:
    stored = StoredModel(folder)
    return Selection.all(stored.names, stored.shapes, fingerprint(folder))


def write(path: Path, selection: Selection, seed: int) -> dict[str, Tensor]:
    """A delta file with normal values; returns them."""
    random = torch.Generator().manual_seed(seed)
    values = {
        name: torch.randn(selection.count_of(name), generator=random)
        for name in selection.names
        if selection.count_of(name)
    }
    delta.save(path, values, selection)
    return values


def same(left: Masters, right: Masters) -> bool:
    return all(torch.equal(left.read(name), right.read(name)) for name in left.names)


def test_file(tiny_llama: Path, tmp_path: Path):
    """The format as it is told: names, dtypes, shapes and header; what is read is what was written."""
    selection = selection_of(tiny_llama, 7)
    values = write(tmp_path / "d.safetensors", selection, seed=0)
    with safe_open(str(tmp_path / "d.safetensors"), framework="pt") as file:
        header = file.metadata()
        assert header["format"] == "allo_ray.delta"
        assert header["base"] == fingerprint(tiny_llama)
        assert (header["dense"], int(header["count"]), int(header["total"])) == (
            "0",
            selection.count,
            selection.total,
        )
        assert sorted(file.keys()) == sorted(
            f"{name}.{part}" for name in selection.indices for part in ("values", "indices")
        )
        assert file.get_tensor("model.norm.weight.values").dtype == torch.float32
        assert file.get_tensor("model.norm.weight.indices").dtype == torch.int32
    read = delta.load(tmp_path / "d.safetensors")
    assert (read.names, read.count, read.total) == (selection.names, selection.count, selection.total)
    for name, expected in values.items():
        indices = read.indices(name)
        assert indices is not None
        assert torch.equal(read.values(name), expected)
        assert torch.equal(indices, selection.indices[name])


def test_masters_of_the_base_alone(base: Path):
    """In the order of `named_parameters`, tied weights once, exactly the stored values."""
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = list(model.named_parameters())
    found = list(iter_masters(base))
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (_, tensor), (_, weight) in zip(found, expected, strict=True):
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weight.float())


def test_masters_under_deltas(base: Path, tmp_path: Path):
    """Later ones win, where both hold a neuron; a dense one replaces everything under it."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    sparse = write(paths[0], selection_of(base, 2), seed=0)
    dense = write(paths[1], dense_selection(base), seed=1)
    later = write(paths[2], selection_of(base, 3, first=1), seed=2)
    stored = StoredModel(base)
    for name, tensor in iter_masters(base, paths):
        expected = dense[name].clone()
        if name in later:
            expected[1::3] = later[name]
        assert torch.equal(tensor, expected.view(stored.shapes[name]))
    for name, tensor in iter_masters(base, [paths[0], paths[2]]):
        expected = stored.read(name).float().view(-1)
        expected[::2] = sparse[name]
        if name in later:
            expected[1::3] = later[name]
        assert torch.equal(tensor.view(-1), expected)


@pytest.mark.parametrize("dense", [False, True])
def test_stack(base: Path, tmp_path: Path, dense: bool):
    """One delta in place of several: the same masters, the union of the neurons; survives its file."""
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    write(paths[0], dense_selection(base) if dense else selection_of(base, 5), seed=0)
    write(paths[1], selection_of(base, 3), seed=1)
    write(paths[2], selection_of(base, 7, first=2), seed=2)
    stacked = delta.stack(paths)
    assert stacked.dense is dense
    sizes = [torch.Size(shape).numel() for shape in stacked.shapes.values()]
    held = {at for at in range(105) if dense or at % 5 == 0 or at % 3 == 0 or at % 7 == 2}
    assert stacked.count == sum(sum(at % 105 in held for at in range(size)) for size in sizes)
    stacked.save(tmp_path / "stacked.safetensors")
    assert same(Masters(base, [tmp_path / "stacked.safetensors"]), Masters(base, paths))
    assert delta.load(tmp_path / "stacked.safetensors").base == fingerprint(base)


@pytest.mark.parametrize("dense", [False, True])
def test_invert(base: Path, tmp_path: Path, dense: bool):
    """Over the base, and over a delta that was there before."""
    under, over = tmp_path / "under.safetensors", tmp_path / "over.safetensors"
    write(under, selection_of(base, 5), seed=0)
    write(over, dense_selection(base) if dense else selection_of(base, 3), seed=1)
    assert not same(Masters(base, [under, over]), Masters(base, [under]))
    undo = invert(delta.load(over), base, [under])
    assert same(Masters(base, [under, over, undo]), Masters(base, [under]))
    undo.save(tmp_path / "undo.safetensors")
    assert same(Masters(base, [under, over, tmp_path / "undo.safetensors"]), Masters(base, [under]))
    assert same(Masters(base, [over, invert(delta.load(over), base)]), Masters(base))


def test_diff(base: Path, tmp_path: Path):
    """Holds the neurons that differ, no others, and leads from the one model to the other."""
    write(tmp_path / "a.safetensors", selection_of(base, 5), seed=0)
    values = write(tmp_path / "b.safetensors", selection_of(base, 3), seed=1)
    before = Masters(base, [tmp_path / "a.safetensors"])
    after = Masters(base, [tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    found = diff(before, after, base=fingerprint(base))
    assert found.count == sum(len(part) for part in values.values())
    assert same(Masters(base, [tmp_path / "a.safetensors", found]), after)
    assert diff(before, before).count == 0


def test_apply(base: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(base)
    write(tmp_path / "d.safetensors", selection_of(base, 3), seed=0)
    delta.apply(delta.load(tmp_path / "d.safetensors"), dict(model.named_parameters()))
    for name, tensor in iter_masters(base, [tmp_path / "d.safetensors"]):
        assert torch.equal(model.get_parameter(name), tensor.bfloat16())
    with pytest.raises(UserError, match="which the model does not have"):
        delta.apply(delta.load(tmp_path / "d.safetensors"), {})


def test_export_is_what_training_computed_with(base: Path, tmp_path: Path):
    """Bit for bit: train bf16 weights with float32 values, save the delta, export, load with transformers."""
    model = AutoModelForCausalLM.from_pretrained(base)
    selection = selection_of(base, 4)
    neurons = attach(model, selection, iter_masters(base))
    optimizer = torch.optim.AdamW(neurons.parameters(), lr=1e-3)
    ids = torch.arange(24).view(2, 12)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        neurons.write()
    delta.save(tmp_path / "d.safetensors", dict(neurons.named_values()), selection)
    neurons.detach()
    export(base, [tmp_path / "d.safetensors"], tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, exported.get_parameter(name)), name
    assert torch.equal(model(ids).logits, exported(ids).logits)
    assert {path.name for path in base.iterdir()} == {path.name for path in (tmp_path / "out").iterdir()}


def test_export_of_nothing_is_the_base(base: Path, tmp_path: Path):
    export(base, [], tmp_path / "out")
    assert fingerprint(tmp_path / "out") == fingerprint(base)


def test_export_in_shards(base: Path, tmp_path: Path):
    """Shards stay shards, with an index that transformers reads."""
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path / "cut", max_shard_size="50KB")
    assert len(StoredModel(tmp_path / "cut").files) > 2
    write(tmp_path / "d.safetensors", selection_of(tmp_path / "cut", 3), seed=0)
    export(tmp_path / "cut", [tmp_path / "d.safetensors"], tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in iter_masters(tmp_path / "cut", [tmp_path / "d.safetensors"]):
        assert torch.equal(exported.get_parameter(name), tensor.bfloat16())
    index = "model.safetensors.index.json"
    told, kept = (json.loads((tmp_path / folder / index).read_text()) for folder in ("out", "cut"))
    assert told["weight_map"] == kept["weight_map"]
    assert told["metadata"]["total_size"] == kept["metadata"]["total_size"]


def test_export_in_another_dtype(base: Path, tmp_path: Path):
    """The masters themselves, and a config that says so."""
    write(tmp_path / "d.safetensors", selection_of(base, 3), seed=0)
    export(base, [tmp_path / "d.safetensors"], tmp_path / "out", dtype=torch.float32)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.dtype == torch.float32
    for name, tensor in iter_masters(base, [tmp_path / "d.safetensors"]):
        assert torch.equal(exported.get_parameter(name), tensor)


def test_tied_weight_stored_under_both_names(tiny_llama: Path, tmp_path: Path):
    """Some folders hold the tied head beside the embedding: both are written."""
    shutil.copytree(tiny_llama, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    write(tmp_path / "d.safetensors", selection_of(tmp_path / "base", 3), seed=0)
    export(tmp_path / "base", [tmp_path / "d.safetensors"], tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], written["model.embed_tokens.weight"])
    assert not torch.equal(written["lm_head.weight"], weights["lm_head.weight"])


def test_another_base(tiny_llama: Path, tiny_qwen: Path, tmp_path: Path):
    """Another architecture, another fingerprint, two deltas that do not belong together, a file that is none."""
    write(tmp_path / "llama.safetensors", selection_of(tiny_llama, 3), seed=0)
    with pytest.raises(
        UserError,
        match=r"llama\.safetensors: made for another model than .*: lm_head\.weight is missing there",
    ):
        Masters(tiny_qwen, [tmp_path / "llama.safetensors"])
    shutil.copytree(tiny_llama, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"but .*other has"):
        export(tmp_path / "other", [tmp_path / "llama.safetensors"], tmp_path / "out")
    write(tmp_path / "other.safetensors", selection_of(tmp_path / "other", 3), seed=0)
    with pytest.raises(UserError, match="Only deltas over the same base go together"):
        delta.stack([tmp_path / "llama.safetensors", tmp_path / "other.safetensors"])
    with pytest.raises(UserError, match="expected a delta"):
        delta.load(tiny_llama / "model.safetensors")
    with pytest.raises(UserError, match="no deltas to stack"):
        delta.stack([])


def test_files_that_lack_a_tensor(tiny_llama: Path, tmp_path: Path):
    shutil.copytree(tiny_llama, tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"promises a tensor model\.norm\.weight"):
        list(iter_masters(tmp_path / "base"))
