"""Which values trials get: random and grid by their number alone, TPE by what is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher

from allo_ray.config.tune import TuneConfig, load_campaign
from allo_ray.tune.records import Record, Records
from allo_ray.tune.search import FEWEST, importances, suggest
from allo_ray.tune.searcher import CampaignSearcher

STATES = ("failed", "running")
SPACE = {
    "k1": "loguniform(0.01, 0.3)",
    "v": "uniform(0, 1)",
    "order": "choice(top, last)",
    "n": "randint(1, 4)",
}


def config(**changes: Any) -> TuneConfig:
    told = {"name": "x", "base": "qa", "space": SPACE, "trials": 50, "objective": {"suite": "s"}}
    return TuneConfig.model_validate(told | changes)


def finished(number: int, values: dict[str, Any], accuracy: float, kl: float = 0.0) -> Record:
    scores = {"SFT": {}, "ALLO": {"s": {"accuracy": accuracy}, "kl": {"kl": kl}}}
    return Record(number, values, "finished", scores)


@pytest.mark.parametrize("searcher", ["tpe", "random"])
def test_values_lie_in_the_space(searcher: str) -> None:
    told = config(searcher=searcher)
    records = [finished(i, suggest(told, [], i), i / 30) for i in range(15)]
    for number in range(15, 25):
        values = suggest(told, records, number)
        assert list(values) == list(SPACE)
        assert 0.01 <= float(values["k1"]) <= 0.3
        assert 0 <= float(values["v"]) <= 1
        assert float(f"{values['v']:.4g}") == values["v"]
        assert values["order"] in ("top", "last")
        assert values["n"] in (1, 2, 3, 4)
        assert isinstance(values["n"], int)


def test_trials_are_handed_out_as_the_cluster_grows_and_shrinks(
    tmp_path: Path, write_campaign: Callable[..., Path]
) -> None:
    """Two fit, then three; of three that run none gives way where one fits, and the next waits for all three. The desk
    hears of what may come: of six trials in all no more than are left."""
    campaign, room, told = load_campaign(write_campaign()), 2, []
    watch: Any = SimpleNamespace(started=lambda *_: None, ended=lambda *_: None, trace=lambda _: "")
    away = SimpleNamespace(remote=lambda *_: None)
    desk: Any = SimpleNamespace(away=away, expect=SimpleNamespace(remote=told.append))
    searcher = CampaignSearcher(campaign, Records(tmp_path / "records"), watch, desk, lambda: room)

    def suggested(name: str) -> Any:
        found = searcher.suggest(name)
        return found["number"] if isinstance(found, dict) else found

    assert [suggested(name) for name in "abc"] == [0, 1, None]
    room = 3
    assert [suggested(name) for name in "cd"] == [2, None]
    room = 1
    for name in "abc":
        assert suggested("e") is None
        searcher.on_trial_complete(name, error=True)
    assert suggested("e") == 3
    room = 9
    assert [suggested(name) for name in "fgh"] == [4, 5, Searcher.FINISHED]
    assert told == [2, 2, 2, 3, 3, 3, 2, 2, 1, 1, 1, 1, 3, 3]


def test_random_search_knows_only_the_number() -> None:
    told = config(searcher="random")
    drawn = [suggest(told, [], number) for number in range(20)]
    known = [finished(number, values, 0.5) for number, values in enumerate(drawn[:9])]
    assert suggest(told, known, 9) == drawn[9]
    assert len({str(values) for values in drawn}) == 20
    assert suggest(config(searcher="random", seed=1), [], 0) != drawn[0]


def test_the_grid_is_every_combination_once() -> None:
    told = config(
        searcher="grid", trials=None, space={"u": "grid(0.1, 0.2, 0.3)", "order": "choice(top, last)"}
    )
    drawn = {tuple(suggest(told, [], number).values()) for number in range(told.total)}
    assert drawn == {(u, order) for u in (0.1, 0.2, 0.3) for order in ("top", "last")}


def test_tpe_goes_where_it_was_good_and_is_repeatable() -> None:
    """Accuracy falls with the distance of v from 0.3. Random search would put half of the values within 0.25."""
    told = config(space={"v": "uniform(0, 1)"})
    records: list[Record] = []
    for number in range(40):
        values = suggest(told, records, number)
        assert suggest(told, records, number) == values
        records.append(finished(number, values, 1 - abs(float(values["v"]) - 0.3)))
    late = [abs(float(record.values["v"]) - 0.3) for record in records[20:]]
    assert sum(distance < 0.25 for distance in late) >= 16


def test_tpe_with_two_objectives_goes_after_both() -> None:
    """KL falls towards a = 0.2, and less is better; accuracy rises towards b = 0.8. By chance 9 of 20 lie near each."""
    told = config(
        space={"a": "uniform(0, 1)", "b": "uniform(0, 1)"},
        objective={"metric": "kl", "goal": "minimise"},
        second={"suite": "s"},
    )
    records: list[Record] = []
    for number in range(60):
        values = suggest(told, records, number)
        a, b = (float(values[name]) for name in "ab")
        records.append(finished(number, values, accuracy=1 - abs(b - 0.8), kl=abs(a - 0.2)))
    late = [record.values for record in records[40:]]
    assert sum(abs(float(values["a"]) - 0.2) < 0.25 for values in late) >= 14
    assert sum(abs(float(values["b"]) - 0.8) < 0.25 for values in late) >= 14


def test_tpe_keeps_to_constraints() -> None:
    """The best of v lies where KL is too large; late trials stay on the allowed side."""
    told = config(space={"v": "uniform(0, 1)"}, constraints=[{"metric": "kl", "below": 0.5}])
    records: list[Record] = []
    for number in range(40):
        values = suggest(told, records, number)
        records.append(finished(number, values, float(values["v"]), kl=float(values["v"])))
    late = [float(record.values["v"]) for record in records[20:]]
    assert sum(v < 0.6 for v in late) >= 14
    assert sum(v > 0.25 for v in late) >= 14


def near(v: float, told: TuneConfig, records: list[Record]) -> int:
    """Of twenty next trials those within 0.05 of `v`."""
    return sum(abs(float(suggest(told, records, number)["v"]) - v) < 0.05 for number in range(40, 60))


def test_tpe_keeps_away_from_what_runs() -> None:
    """Accuracy is best at 0.3, and all next trials would go there; eight that run there are reason enough to go
    elsewhere, and eight that failed are none."""
    told = config(space={"v": "uniform(0, 1)"})
    spread = [i * 0.37 % 1 for i in range(20)]
    known = [finished(i, {"v": v}, 1 - abs(v - 0.3)) for i, v in enumerate(spread)]
    there = {state: [Record(20 + i, {"v": 0.26 + 0.01 * i}, state) for i in range(8)] for state in STATES}
    assert near(0.3, told, known) == near(0.3, told, known + there["failed"]) == 20
    assert near(0.3, told, known + there["running"]) == 0


def test_tpe_learns_from_trials_that_were_stopped_early() -> None:
    """No trial has got to its end yet; of twelve forgotten models those near 0.7 were best."""
    told = config(space={"v": "uniform(0, 1)"})
    early = [{"SFT": {}, "forgotten": {"s": {"accuracy": 1 - abs(i / 11 - 0.7)}}} for i in range(12)]
    stopped = [Record(i, {"v": i / 11}, "stopped early", early=early[i]) for i in range(12)]
    assert near(0.7, told, stopped) > 10


@pytest.mark.parametrize("goal", ["maximise", "minimise"])
@pytest.mark.parametrize("second", [None, {"metric": "kl", "goal": "minimise"}])
def test_importances_tell_what_the_best_have_in_common(goal: str, second: dict[str, Any] | None) -> None:
    """The best trials are those of a large v; the worst, as far away again, those of a small u, whatever their v."""
    objective = {"suite": "s", "goal": goal}
    told = config(
        space={"v": "uniform(0, 1)", "u": "uniform(0, 1)"},
        objective=objective,
        second=second,
        searcher="random",
    )
    drawn = [suggest(told, [], number) for number in range(80)]
    sign = 1 if goal == "maximise" else -1
    records = [
        finished(i, values, sign * (float(values["v"]) if float(values["u"]) > 0.2 else -1.0))
        for i, values in enumerate(drawn)
    ]
    found = importances(told, records)
    assert found["v"] > 0.8
    assert sum(found.values()) == pytest.approx(1)
    assert importances(told, records[: FEWEST - 1]) == {}
    assert importances(told, [finished(i, values, 0.5) for i, values in enumerate(drawn)]) == {}
