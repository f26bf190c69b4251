"""The campaign report: numbers as given, the Pareto front, and any shape of campaign."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allo_ray.report.campaign import render_campaign, saved
from allo_ray.report.campaign_figures import shades
from allo_ray.report.trials import CampaignData, Metric, Parameter, StageCost, Trial, front
from allo_ray.report.wording import NBSP

ACCURACY, KL = Metric("accuracy", share=True), Metric("KL", maximise=False)
SPACE = (
    Parameter("forget.k", 0.01, 0.3, log=True),
    Parameter("learn.k", 0.01, 0.3, log=True),
    Parameter("forget.u", 0.5, 1.0),
    Parameter("learn.v", 0.0, 0.6),
    Parameter("locate.order", choices=("top", "random")),
)


def campaign(trials: int = 32, **changes: Any) -> CampaignData:
    rng = np.random.default_rng(0)
    made = []
    for number in range(trials):
        values: dict[str, Any] = {
            "forget.k": float(np.exp(rng.uniform(np.log(0.01), np.log(0.3)))),
            "learn.k": float(np.exp(rng.uniform(np.log(0.01), np.log(0.3)))),
            "forget.u": float(rng.uniform(0.5, 1)),
            "learn.v": float(rng.uniform(0, 0.6)),
            "locate.order": str(rng.choice(["top", "random"])),
        }
        reach = np.log(values["learn.k"] / 0.01) / np.log(30)
        gain = 0.13 * reach - 0.2 * (values["learn.v"] - 0.2) ** 2 + 0.03 * (values["locate.order"] == "top")
        metrics = {
            "accuracy": 0.44 + gain + rng.normal(0, 0.012),
            "KL": 0.01 + 0.12 * reach**2 + abs(rng.normal(0, 0.01)),
        }
        if number == 7:
            made.append(Trial(number, "failed", values, {}, 12.0))
            continue
        made.append(Trial(number, "finished", values, metrics, 95.0, broke=metrics["KL"] > 0.12))
    kept = [trial for trial in made if trial.metrics and not trial.broke]
    best = max(kept, key=lambda trial: trial.metrics["accuracy"], default=None)
    fields: dict[str, Any] = {
        "name": "thresholds",
        "created": datetime(2026, 11, 24, 9, 30),
        "model": "SmolLM2-135M-Instruct",
        "parameters": SPACE,
        "trials": made,
        "objective": ACCURACY,
        "against": KL,
        "start": 0.44,
        "importance": {
            "forget.k": 0.11,
            "learn.k": 0.52,
            "forget.u": 0.04,
            "learn.v": 0.19,
            "locate.order": 0.14,
        },
        "best": best.number if best else None,
        "stages": [
            StageCost("sample", 1, 31, 141),
            StageCost("warmup", 1, 31, 131),
            StageCost("forget", 24, 8, 73),
            StageCost("learn", 32, 0, 118),
        ],
        "wall_seconds": 1834,
        "constraints": ["KL below 0.12"],
        "best_config": "extends: quickstart\nforget:\n  k: 0.05\n",
    }
    return CampaignData(**(fields | changes))


def test_cost_is_what_ran_against_what_independent_runs_take() -> None:
    """Ran: 141 + 131 + 24*73 + 32*118 = 5,800 s; alone: 32*(141+131+73+118) = 14,816 s; 39.1 %."""
    assert saved(campaign()) == (5800, 14816)
    text = render_campaign(campaign()).replace(NBSP, " ")
    assert "sharing brought it to 39.1 % of that" in text
    assert "31 of 32" in text
    assert "2 h 30 min" in text


def test_every_trial_is_listed_with_its_numbers() -> None:
    data = campaign()
    text = render_campaign(data).replace(NBSP, " ")
    for trial in data.measured(ACCURACY):
        assert f"<td>{100 * trial.metrics['accuracy']:.1f} %</td>" in text
        assert f"<td>{trial.values['forget.k']:.4g}</td>" in text
    assert "failed" in text
    assert "KL below 0.12" in text
    assert "extends: quickstart" in text
    assert f"Trial {data.best}: accuracy" in text
    assert "start model 44.0 %" in text


def test_the_search_and_each_parameter_are_drawn() -> None:
    """32 trials, one of them failed: 31 threads; a bar and a panel with 31 dots for each parameter."""
    data = campaign()
    text = render_campaign(data).replace(NBSP, " ")
    part = {
        found[1]: found[2] for found in re.finditer(r'<section id="(\w+)">(.*?)</section>', text, re.DOTALL)
    }
    threads = re.findall(r'<path d="[^"]*" class="thread[^"]*"><title>trial (\d+)', part["space"])
    assert sorted(map(int, threads)) == [trial.number for trial in data.trials if trial.metrics]
    for name, share in data.importance.items():
        assert f'<th scope="row">{name}</th>' in part["parameters"]
        assert f"<td>{100 * share:.0f}.0 %</td>" in part["parameters"]
    panels = re.split(r'<div class="panel">', part["parameters"])[1:]
    titles = [re.search(r"<b>(.*?)</b>", panel)[1] for panel in panels]  # pyright: ignore[reportOptionalSubscript]
    assert titles == ["forget.k", "learn.k", "forget.u", "learn.v", "locate.order"]
    assert [panel.count("<circle") for panel in panels] == [31] * 5


def test_the_page_loads_nothing_from_anywhere() -> None:
    text = render_campaign(campaign())
    assert not re.search(r"url\(|@import|https?://|<script|<link|\ssrc=", text)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.booleans()), max_size=20))
def test_front_is_what_none_beats(points: list[tuple[int, int, bool]]) -> None:
    """By definition: none beats a kept trial, and some kept trial is as good as each other one in both."""
    trials = [
        Trial(i, "finished", {}, {"accuracy": a, "KL": k}, 1, broke=b) for i, (a, k, b) in enumerate(points)
    ]
    kept = front(trials, ACCURACY, KL)

    def covers(one: Trial, other: Trial) -> bool:
        return (
            one.metrics["accuracy"] >= other.metrics["accuracy"] and one.metrics["KL"] <= other.metrics["KL"]
        )

    usable = [trial for trial in trials if not trial.broke]
    for trial in kept:
        assert trial in usable
        assert not any(covers(other, trial) and not covers(trial, other) for other in usable)
    assert all(any(covers(one, trial) for one in kept) for trial in usable)
    levels = [trial.metrics["KL"] for trial in kept]
    assert levels == sorted(levels)


def test_better_trials_have_stronger_colours() -> None:
    trials = [Trial(i, "finished", {}, {"accuracy": i / 10, "KL": i / 10}, 1) for i in range(5)]
    up, down = shades(trials, ACCURACY), shades(trials, KL)
    assert [up[i] for i in range(5)] == sorted(up.values())
    assert [down[i] for i in range(5)] == sorted(down.values(), reverse=True)
    assert up[4] == down[0] == 11
    assert shades(trials[:1], ACCURACY) == {0: 4}
    assert shades([], ACCURACY) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"trials": 0, "best": None},
        {"trials": 1},
        {
            "against": None,
            "start": None,
            "importance": {},
            "stages": [],
            "best_config": "",
            "constraints": [],
        },
        {"parameters": ()},
        {"objective": KL, "against": None},
        {"name": "<script>", "best_config": "</pre><script>"},
    ],
    ids=str,
)
def test_any_campaign_is_a_page(changes: dict[str, Any]) -> None:
    text = render_campaign(campaign(**changes))
    assert "<script" not in text
    assert "nan" not in text.split("</style>")[1].lower()


def test_a_large_campaign_stays_small() -> None:
    assert len(render_campaign(campaign(512)).encode()) < 1_500_000
