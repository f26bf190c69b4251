"""Campaign configs: distributions as they are written, and what is wrong before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from allo_ray.config.load import dump, presets
from allo_ray.config.space import Distribution
from allo_ray.config.tune import TuneConfig, load_campaign
from allo_ray.errors import UserError

CAMPAIGN: dict[str, Any] = {
    "name": "thresholds",
    "base": "qa",
    "space": {"k1": "loguniform(0.01, 0.3)", "v": "uniform(0, 0.5)"},
    "trials": 4,
    "objective": {"suite": "QASC"},
}


def written(folder: Path, **changes: Any) -> Path:
    file = folder / "campaign.yaml"
    file.write_text(yaml.safe_dump(CAMPAIGN | changes))
    return file


@pytest.mark.parametrize("name", [name for name in presets() if name.startswith("campaign")])
def test_every_campaign_preset_parses_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    campaign = load_campaign(name)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump(campaign.config))
    assert load_campaign(copy) == campaign


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        ("loguniform(0.01, 0.3)", (0.01, 0.3)),
        ("uniform(0, 1)", (0, 1)),
        ("randint(1, 8)", (1, 8)),
        ("choice(top, random)", ("top", "random")),
        ("choice(5e-6, 1e-5)", (5e-6, 1e-5)),
        ("grid(1, 2, 4)", (1, 2, 4)),
        ("choice(true, false)", (True, False)),
    ],
)
def test_a_distribution_is_read_as_it_is_written(text: str, ends: tuple[object, ...]) -> None:
    told = Distribution.model_validate(text)
    assert told.ends == ends
    assert [type(end) for end in told.ends] == [type(end) for end in ends]
    assert Distribution.model_validate(told.told()) == told


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("normal(0, 1)", "expected one of uniform"),
        ("uniform(0.5)", "two numbers"),
        ("uniform(1, 0.5)", "low < high"),
        ("loguniform(0, 1)", "0 < low < high"),
        ("randint(0.5, 2)", "whole numbers"),
        ("uniform(a, b)", "two numbers"),
        ("choice(1)", "two values or more"),
        ("choice(1, 1)", "two values or more"),
        ("choice([1], [2])", "neither a number nor a word"),
        (0.5, "write it as one of"),
    ],
)
def test_a_wrong_distribution_is_named(text: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"(?s)space\.k1: .*{said}"):
        load_campaign(written(tmp_path, space={"k1": text}))


def test_drawn_numbers_are_short_and_inside_the_bounds() -> None:
    told = Distribution.model_validate("uniform(0.1234567, 0.3)")
    assert told.rounded(0.234567) == 0.2346
    assert told.rounded(0.1234568) == 0.1235
    assert told.rounded(0.12345675) >= 0.1234567
    assert Distribution.model_validate("randint(1, 100000)").rounded(12345) == 12345


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"space": {"k1": "uniform(0, 1)", "forget.k": "uniform(0, 1)"}}, "names a field twice"),
        ({"trials": None}, "trials is needed"),
        ({"searcher": "grid"}, "needs grid"),
        ({"searcher": "grid", "space": {"k1": "grid(0.1, 0.2)"}, "trials": 3}, "has 2 combinations"),
        ({"objective": {"metric": "kl", "suite": "QASC"}}, "kl has no suite"),
        ({"objective": {}}, "needs the title"),
        (
            {"objective": {"suite": "QASC", "metric": "f1"}},
            r"objective\.metric: .*'accuracy', 'low', 'high' or 'kl' \(found 'f1'\)",
        ),
        ({"constraints": [{"metric": "kl"}]}, "below"),
        ({"scheduler": "asha", "keep": 1}, "stops nothing"),
        ({"scheduler": "asha", "second": {"metric": "kl"}}, "one objective"),
        ({"space": {}}, "at least 1"),
        ({"nonsense": 1}, "unknown key"),
        ({"set": {"learn.lrr": 1}}, "learn.lrr: unknown key"),
        ({"base": "nosuchpreset"}, "no such preset"),
    ],
    ids=str,
)
def test_a_wrong_campaign_is_told_why(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load_campaign(written(tmp_path, **changes))


def test_the_base_is_changed_by_set_and_by_a_trial(tmp_path: Path) -> None:
    """Sections and dotted names alike; short names are the method's thresholds; the rest is the base's."""
    file = written(tmp_path, set={"learn": {"lr": 1e-3}, "forget.beta": 0.5, "store": "elsewhere"})
    campaign = load_campaign(file, ["trials=7", "set.seed=3"])
    run = campaign.run({"k1": 0.02, "v": 0.4})
    assert campaign.config.total == 7
    assert (run.store, run.seed) == ("elsewhere", 3)
    assert run.forget is not None
    assert run.learn is not None
    assert (run.forget.k, run.forget.beta, run.learn.v, run.learn.lr) == (0.02, 0.5, 0.4, 1e-3)
    assert run.learn.k == 0.1
    assert run.model_copy(update={"forget": None, "learn": None}) == campaign.base.model_copy(
        update={"forget": None, "learn": None}
    )


def test_the_base_may_lie_beside_the_campaign(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: qa\nname: mine\n")
    assert load_campaign(written(tmp_path, base="mine.yaml")).base.name == "mine"


def test_a_value_outside_a_field_names_the_field_and_the_values() -> None:
    campaign = load_campaign("campaign")
    with pytest.raises(UserError, match=r"(?s)k1 = 1.5.*forget\.k: .*less than or equal to 1"):
        campaign.run({"k1": 1.5})


def test_words() -> None:
    config = TuneConfig.model_validate(
        CAMPAIGN | {"constraints": [{"metric": "kl", "below": 0.1}, {"suite": "QASC", "above": 0.5}]}
    )
    assert config.objective.words == "QASC accuracy"
    assert [bound.told for bound in config.constraints] == ["KL below 0.1", "QASC accuracy above 0.5"]
    kl, accuracy = config.constraints
    assert kl.excess(0.25) == pytest.approx(0.15)
    assert accuracy.excess(0.6) == pytest.approx(-0.1)
