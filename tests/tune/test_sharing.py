"""Which stages trials share, by the real graph of a run, and what is wrong with a campaign before it starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from allo_ray import method
from allo_ray.config.tune import load_campaign
from allo_ray.errors import UserError
from allo_ray.pipeline import plan
from allo_ray.store import Store
from allo_ray.tune.campaign import check
from allo_ray.tune.sharing import corners, early_part, shared_keys, shared_part

Write = Callable[..., Path]
START = ["model", "prompts", "sft prompts", "sft", "sample", "pairs", "reference", "warmup"]
SCORED = ["rewrite", "reward", "token scores"]


@pytest.mark.parametrize(
    ("space", "own"),
    [
        ({"v": "uniform(0, 0.5)"}, {"learn", "evaluate"}),
        ({"k2": "uniform(0.2, 0.3)"}, {"locate 20 %", "learn", "evaluate"}),
        ({"u": "uniform(0.5, 1)"}, {"forget", "reference of forget", "learn", "evaluate"}),
        (
            {"k1": "loguniform(0.01, 0.3)", "v": "choice(0, 0.5)"},
            {"locate 1 %", "forget", "reference of forget", "learn", "evaluate"},
        ),
        ({"warmup.method": "choice(dpo, sft, npo)"}, None),
    ],
)
def test_shared_stages_are_those_that_no_field_touches(
    write_campaign: Write, tmp_path: Path, space: dict[str, str], own: set[str] | None
) -> None:
    file = write_campaign(base="smoke", space=space, searcher="random", trials=2)
    campaign, store = load_campaign(file), Store(str(tmp_path / "store"))
    nodes = method.graph(campaign.run(next(corners(campaign))))
    keys = shared_keys(campaign, method.graph, store)
    shared = {item.node.name for item in plan(nodes, store) if item.key in keys}
    names = {node.name for node in nodes}
    if own is None:
        own = names - {*START[:-1], *SCORED}
    assert names - shared == own


def test_what_all_trials_share_is_evaluated_once_beforehand(write_campaign: Write, tmp_path: Path) -> None:
    """The warm-up's model too, but not the forgotten one, which is each trial's own."""
    campaign = load_campaign(write_campaign(base="smoke"))
    store = Store(str(tmp_path / "store"))
    nodes = method.graph(campaign.run(next(corners(campaign))))
    part = shared_part(nodes, store, shared_keys(campaign, method.graph, store))
    assert {node.name for node in part} == {
        *START,
        *SCORED,
        "importance",
        "locate 5 %",
        "locate 10 %",
        "evaluate",
    }
    assert set(part[-1].inputs) == {"model SFT", "model DPO", "prompts", "samples"}


def test_the_early_part_ends_with_the_forgotten_model() -> None:
    campaign = load_campaign("campaign-smoke")
    part = early_part(method.graph(campaign.run({"u": 0.9, "v": 0.2})))
    names = [node.name for node in part]
    assert "forget" in names
    assert not {"learn", "reference of forget", "locate 10 %"} & set(names)
    assert list(part[-1].inputs) == ["model SFT", "model DPO", "model forgotten", "prompts", "samples"]


def test_corners_are_the_ends_of_each_field_and_their_combinations(write_campaign: Write) -> None:
    space = {"u": "uniform(0.5, 1)", "v": "grid(0.1, 0.2, 0.3)"}
    found = list(corners(load_campaign(write_campaign(space=space, searcher="random", trials=1))))
    assert {tuple(corner.values()) for corner in found} == {(u, v) for u in (0.5, 1) for v in (0.1, 0.2, 0.3)}
    assert len(found) == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"space": {"k1": "uniform(0.01, 1.5)"}}, r"(?s)k1 = 1\.5.*forget\.k.*less than or equal to 1"),
        ({"space": {"learn.batch_size": "uniform(8, 64)"}}, r"(?s)learn\.batch_size = 25\.83.*integer"),
        ({"space": {"learn.vv": "uniform(0, 1)"}}, r"learn\.vv: unknown key"),
        ({"space": {"learn.vv.x": "uniform(0, 1)"}}, r"learn\.vv: unknown key"),
        ({"space": {"trainer.workers": "randint(1, 2)"}}, "trainer.workers changes no result"),
        ({"objective": {"suite": "GSM8K"}}, r"no suite is called 'GSM8K'.* held-out"),
        (
            {"objective": {"suite": "held-out", "model": "PPO"}},
            "no model is called 'PPO'.* SFT, DPO, forgotten, ALLO",
        ),
        (
            {"constraints": [{"metric": "kl", "below": 1}], "set": {"evaluate.kl_samples": 0}},
            "kl needs samples",
        ),
        ({"scheduler": "asha"}, "no field of the space changes forgetting"),
        ({"scheduler": "asha", "set": {"forget": None}}, "the base needs both"),
        ({"set": {"locate": {"order": "band", "band": [0, 0.05]}}}, "band"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_before_anything_starts(
    write_campaign: Write, tmp_path: Path, changes: dict, said: str
) -> None:
    told = {"base": "smoke", "space": {"v": "uniform(0, 0.5)"}, "searcher": "random", "trials": 2}
    if "set" in changes:
        changes = changes | {"set": {"evaluate": {}, **changes["set"]}}
    with pytest.raises(UserError, match=said):
        check(load_campaign(write_campaign(**told | changes)), Store(str(tmp_path / "store")))
