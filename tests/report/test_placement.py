"""Tensor names of several architectures as layer x module."""

from __future__ import annotations

import pytest

from allo_ray.report.placement import place


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        ("model.layers.3.self_attn.q_proj.weight", ("3", "q_proj")),
        ("model.layers.11.mlp.down_proj.weight", ("11", "down_proj")),
        ("transformer.h.0.attn.c_attn.weight", ("0", "attn.c_attn")),
        ("gpt_neox.layers.2.mlp.dense_h_to_4h.weight", ("2", "dense_h_to_4h")),
        ("model.layers.5.mlp.experts.17.up_proj.weight", ("5", "experts.*.up_proj")),
    ],
)
def test_matrices_of_layers(name: str, cell: tuple[str, str]) -> None:
    placed = place({name: (3, 10)})
    assert placed.cells == {cell: (3, 10)}
    assert placed.apart == []


@pytest.mark.parametrize(
    ("name", "apart"),
    [
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("model.norm.weight", "norm"),
        ("transformer.ln_f.weight", "transformer.ln_f"),
        ("model.layers.3.input_layernorm.weight", "input_layernorm, all layers"),
        ("model.layers.3.self_attn.q_norm.weight", "self_attn.q_norm, all layers"),
        ("transformer.h.0.ln_1.weight", "ln_1, all layers"),
        ("model.layers.3.self_attn.q_proj.bias", "self_attn.q_proj.bias, all layers"),
    ],
)
def test_everything_else_stands_apart(name: str, apart: str) -> None:
    placed = place({name: (3, 10)})
    assert [item.name for item in placed.apart] == [apart]
    assert placed.cells == {}


def test_sums_agree_and_layers_are_in_order() -> None:
    """Layers 2, 10, 0 come as 0, 2, 10; norms of all layers and experts of one layer are added up."""
    selection = {f"model.layers.{layer}.input_layernorm.weight": (layer, 10) for layer in (2, 10, 0)}
    selection |= {
        f"model.layers.{layer}.mlp.experts.{i}.up_proj.weight": (i, 8) for layer in (2, 10, 0) for i in (1, 2)
    }
    placed = place(selection)
    assert placed.layers == ["0", "2", "10"]
    assert placed.cells["10", "experts.*.up_proj"] == (3, 16)
    (norms,) = placed.apart
    assert (norms.tensors, norms.selected, norms.total, norms.low, norms.high) == (3, 12, 30, 0.0, 1.0)
    assert norms.share == 0.4
    assert (placed.selected, placed.total) == (12 + 9, 30 + 48)
