"""Which values trials get: random and grid by their number alone, TPE by what is known."""

from __future__ import annotations

from typing import Any

import pytest

from allo_ray.config.tune import TuneConfig
from allo_ray.tune.records import Record
from allo_ray.tune.search import FEWEST, importances, suggest

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


def test_every_state_of_a_trial_is_taken_in() -> None:
    told = config(space={"v": "uniform(0, 1)"})
    early = {"SFT": {}, "forgotten": {"s": {"accuracy": 0.2}}}
    records = [
        *(finished(i, {"v": i / 20}, i / 20) for i in range(12)),
        Record(12, {"v": 0.1}, "stopped early", early=early),
        Record(13, {"v": 0.2}, "failed"),
        Record(14, {"v": 0.99}, "running"),
    ]
    assert 0 <= float(suggest(told, records, 15)["v"]) <= 1


def test_importances_tell_what_matters() -> None:
    told = config(space={"v": "uniform(0, 1)", "u": "uniform(0, 1)"})
    drawn = [suggest(told, [], number) for number in range(40)]
    records = [finished(i, values, 1 - abs(float(values["v"]) - 0.5)) for i, values in enumerate(drawn)]
    found = importances(told, records)
    assert found["v"] > 0.8
    assert sum(found.values()) == pytest.approx(1)
    assert importances(told, records[: FEWEST - 1]) == {}
    assert importances(told, [finished(i, values, 0.5) for i, values in enumerate(drawn)]) == {}
