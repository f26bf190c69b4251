"""Which values the next trial gets: a function of the config and of what is known of the other trials.

Nothing is kept between two calls, so a resumed campaign goes on as the interrupted one would have. Random search and
the grid depend on the trial's number alone, TPE on the results so far as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.importance import get_param_importances
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from allo_ray.config.space import Distribution, Value
from allo_ray.config.tune import TuneConfig
from allo_ray.tune.measure import value_of
from allo_ray.tune.records import Record

optuna.logging.set_verbosity(optuna.logging.WARNING)

#: Finished trials below which importances say nothing.
FEWEST = 8


def suggest(config: TuneConfig, records: Iterable[Record], number: int) -> dict[str, Value]:
    """Values of trial `number`, by name."""
    if config.searcher == "grid":
        choices = [told.values for told in config.space.values()]
        drawn = next(itertools.islice(itertools.product(*choices), number, None))
        return dict(zip(config.space, drawn, strict=True))
    study = _study(config, records, _sampler(config, number))
    trial = study.ask(fixed_distributions=_distributions(config))
    return {name: config.space[name].rounded(trial.params[name]) for name in config.space}


def importances(config: TuneConfig, records: Iterable[Record]) -> dict[str, float]:
    """Share of each parameter in telling good trials from the rest (PED-ANOVA); empty where too little is known."""
    finished = [record for record in records if record.state == "finished"]
    found = {value_of(config.objective, record.scores) for record in finished}
    if len(finished) < FEWEST or len(found) < 2:
        return {}
    # Of the objective alone, in its own direction: a target function would be taken for one that is to be low.
    return get_param_importances(_study(config.model_copy(update={"second": None}), finished))


def _study(config: TuneConfig, records: Iterable[Record], sampler: BaseSampler | None = None) -> optuna.Study:
    """All trials as Optuna knows them, those that run now included: TPE keeps away from these."""
    objectives = [config.objective, *([config.second] if config.second else [])]
    directions = [
        StudyDirection.MAXIMIZE if goal.maximise else StudyDirection.MINIMIZE for goal in objectives
    ]
    study = optuna.create_study(directions=directions, sampler=sampler)
    for record in records:
        study.add_trial(_trial(config, record))
    return study


def _trial(config: TuneConfig, record: Record) -> FrozenTrial:
    told: dict[str, Any] = {"params": record.values, "distributions": _distributions(config)}
    if record.state == "finished":
        goals = [config.objective, *([config.second] if config.second else [])]
        told |= {"values": [value_of(goal, record.scores) for goal in goals]}
        told |= {
            "constraints": {
                bound.told: bound.excess(value_of(bound, record.scores)) for bound in config.constraints
            }
        }
        return create_trial(state=TrialState.COMPLETE, **told)
    if record.state == "stopped early":
        after_forgetting = value_of(config.objective, record.early)
        return create_trial(state=TrialState.PRUNED, intermediate_values={1: after_forgetting}, **told)
    state = TrialState.RUNNING if record.state == "running" else TrialState.FAIL
    return create_trial(state=state, **told)


def _sampler(config: TuneConfig, number: int) -> BaseSampler:
    seed = config.seed * 1_000_003 + number
    return RandomSampler(seed=seed) if config.searcher == "random" else TPESampler(seed=seed)


def _distributions(config: TuneConfig) -> dict[str, BaseDistribution]:
    return {name: _distribution(told) for name, told in config.space.items()}


def _distribution(told: Distribution) -> BaseDistribution:
    if told.values:
        return CategoricalDistribution(told.values)
    if told.kind == "randint":
        return IntDistribution(int(told.low), int(told.high))
    return FloatDistribution(float(told.low), float(told.high), log=told.kind == "loguniform")
