"""Every shipped config parses; wrong keys and values are named, all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from allo_ray.config.base import semantic
from allo_ray.config.load import PRESETS, dump, load, presets
from allo_ray.errors import UserError


@pytest.mark.parametrize("name", [name for name in presets() if not name.startswith("campaign")])
def test_every_preset_parses_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load(name)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(config))
    assert load(copy) == config


def test_presets_hold_table_5() -> None:
    """Table 5 of the paper, stage 1 and stage 2, columns QA, Math, Human Alignment."""
    table = {
        "qa": (1e-7, 32, 0.05, 0.95, 0.1, 5e-6, 32, 0.10, 0.20, 0.1),
        "math": (5e-8, 512, 0.05, 0.95, 0.1, 1e-6, 512, 0.20, 0.50, 0.1),
        "instruct": (1e-7, 128, 0.10, 0.95, 0.1, 5e-6, 128, 0.15, 0.20, 0.1),
    }
    for name, expected in table.items():
        forget, learn = load(name).forget, load(name).learn
        assert forget is not None
        assert learn is not None
        found = (forget.lr, forget.batch_size, forget.k, forget.u, forget.beta)
        assert (*found, learn.lr, learn.batch_size, learn.k, learn.v, learn.beta) == expected


def test_overrides_reach_nested_keys_and_read_exponents_without_a_dot() -> None:
    config = load("qa", ["learn.k=0.07", "forget.lr=5e-6", "sample.stop=['###']"])
    assert config.learn is not None
    assert config.forget is not None
    assert config.sample is not None
    assert (config.learn.k, config.forget.lr, config.sample.stop) == (0.07, 5e-6, ("###",))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("learn.k=1.5", "learn.k"),
        ("learn.k=0", "learn.k"),
        ("forget.u=1.01", "forget.u"),
        ("learn.v=-0.1", "learn.v"),
        ("learn.kk=1", "learn.kk: unknown key"),
        ("sample=null", "needs the section `sample`"),
        ("rewrite=null", "forget.weight"),
        ("locate.order=band", "locate.band"),
        ("baselines={a: {loss: ppo, lr: 1e-6}, b: {loss: ppo3, lr: 1e-6}}", "baselines.b.loss"),
        ("learn", "--set learn.k=0.1"),
        ("data.template=hello", "{prompt}"),
        ("engine.pool={num_gpus: 2, tensor_parallel: 4}", "Set num_gpus: 4"),
        ("evaluate.suites=[{name: transfer, label: kl}]", "no suite may be called kl"),
    ],
)
def test_a_wrong_value_is_named(override: str, named: str) -> None:
    with pytest.raises(UserError, match=named.replace("{", r"\{").replace(".", r"\.")):
        load("qa", [override])


def test_all_errors_come_at_once() -> None:
    with pytest.raises(UserError, match="3 error"):
        load("qa", ["learn.k=2", "forget.u=2", "nonsense=1"])


def test_a_missing_file_names_the_presets(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quickstart"):
        load("nosuchpreset")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "no.yaml")


def test_broken_yaml_and_circles_are_user_errors(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1,")
    with pytest.raises(UserError, match="no valid YAML"):
        load(broken)
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("extends: two.yaml")
    two.write_text("extends: one.yaml")
    with pytest.raises(UserError, match="extends itself"):
        load(one)


def test_resources_decide_no_key() -> None:
    """More workers and actors change no result, so they change no cache key; a learning rate does."""
    base = semantic(load("qa"))
    assert semantic(load("qa", ["trainer.workers=2", "engine.pool.actors=3", "cluster.num_cpus=9"])) == base
    assert semantic(load("qa", ["trainer.resources.trainer=1", "trainer.placement=spread"])) == base
    assert semantic(load("qa", ["learn.lr=1e-3"])) != base


def test_preset_files_say_how_to_run_them() -> None:
    for path in PRESETS.glob("*.yaml"):
        job = "allo tune" if path.stem.startswith("campaign") else "allo align"
        assert job in path.read_text(encoding="utf-8"), f"{path.name}: no command in its header"


def test_token_advantages_need_a_reward_model() -> None:
    baseline = "baselines={a2c: {loss: ppo_a2c, lr: 1e-6}}"
    assert load("qa", [baseline]).baselines["a2c"].needs_scores
    with pytest.raises(UserError, match=r"baselines\.a2c needs token scores"):
        load("qa", [baseline, "forget.weight=none", "reward=null"])
