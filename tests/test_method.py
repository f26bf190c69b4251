"""The graph has the stages that the config asks for, and a setting re-runs exactly what depends on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from allo_ray.config.load import load
from allo_ray.method import graph
from allo_ray.pipeline import plan
from allo_ray.stages.locate import located
from allo_ray.store import Store


def _keys(store: Store, *overrides: str) -> dict[str, str]:
    return {item.node.name: item.key for item in plan(graph(load("smoke", overrides)), store)}


def _changed(store: Store, *overrides: str) -> set[str]:
    before, after = _keys(store), _keys(store, *overrides)
    return {name for name in after if before.get(name) != after[name]}


TAIL = {"forget", "reference of forget", "learn", "evaluate"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("forget.u=0.5", TAIL),
        ("learn.v=0.5", {"learn", "evaluate"}),
        ("learn.k=0.2", {"locate 20 %", "learn", "evaluate"}),
        ("forget.k=0.02", {"locate 2 %", *TAIL}),
        ("locate.order=last", {"locate 5 %", "locate 10 %", *TAIL}),
        ("trainer.micro_batch_tokens=64", set()),
        ("engine.pool.actors=2", set()),
        ("name=other", set()),
    ],
)
def test_a_setting_re_runs_what_depends_on_it(override: str, expected: set[str], tmp_path: Path) -> None:
    assert _changed(Store(str(tmp_path)), override) == expected


@pytest.mark.parametrize("override", ["data.max_tokens=99", "pair.max_dropped=0.5"])
def test_the_remedies_for_long_pairs_draw_no_sample_again(override: str, tmp_path: Path) -> None:
    changed = _changed(Store(str(tmp_path)), override)
    assert "pairs" in changed
    assert not changed & {"prompts", "sample", "sft"}


def test_algorithm_1_in_order(tmp_path: Path) -> None:
    names = list(_keys(Store(str(tmp_path))))
    order = ["sft", "sample", "pairs", "reference", "warmup", "forget", "learn", "evaluate"]
    assert [name for name in names if name in order] == order


def test_stages_can_be_left_out(tmp_path: Path) -> None:
    """Table 4: without the forgetting stage, and without the learning stage."""
    store = Store(str(tmp_path))
    without = set(_keys(store, "forget=null"))
    assert not without & {"forget", "rewrite", "reward", "token scores", "reference of forget"}
    assert "learn" in without
    assert "learn" not in _keys(store, "learn=null")


def test_only_a_baseline_with_token_advantages_asks_for_scores(tmp_path: Path) -> None:
    store, without = Store(str(tmp_path)), "forget.weight=none"
    assert "token scores" not in _keys(store, without, "baselines={PPO: {loss: ppo, lr: 1e-6}}")
    names = list(_keys(store, without, "baselines={A2C: {loss: ppo_a2c, lr: 1e-6}}"))
    assert names.index("token scores") < names.index("baseline A2C") < names.index("evaluate")


def test_learning_against_the_backbone_needs_no_second_reference(tmp_path: Path) -> None:
    assert "reference of forget" not in _keys(Store(str(tmp_path)), "learn.reference=sft")


def test_the_divergence_is_measured_on_the_runs_own_samples() -> None:
    """Ready pairs come without samples of the SFT model, so there is nothing to measure on."""
    assert {"prompts", "samples"} <= set(graph(load("smoke"))[-1].inputs)
    overrides = ["model.path=tiny:llama", f"data.path={__file__}", "data.format=jsonl"]
    ready = [node for node in graph(load("instruct", overrides)) if node.name == "evaluate"]
    assert set(ready[0].inputs) == {f"model {label}" for label in ("SFT", "DPO", "forgotten", "ALLO")}


def test_every_other_share_is_located_by_another_node() -> None:
    """Also where two of them are equal to six digits; the common ones read as they are written."""
    assert [located(k) for k in (0.05, 0.1, 0.07, 1)] == [f"locate {k} %" for k in (5, 10, 7, 100)]
    config = load("smoke", ["forget.k=0.1", "learn.k=0.10000001"])
    names = [node.name for node in graph(config)]
    assert {"locate 10 %", "locate 10.000001 %"} <= set(names)
