"""What a campaign report shows, as plain values: its space, its trials, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

Value = float | int | str | bool


@dataclass(frozen=True)
class Parameter:
    """One searched field: numbers in [low, high], on a logarithmic scale where `log`, or one of `choices`."""

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: Sequence[Value] = ()


@dataclass(frozen=True)
class Metric:
    """A measured quantity of a trial; a `share` in [0, 1] is shown in per cent."""

    name: str
    maximise: bool = True
    share: bool = False


@dataclass(frozen=True)
class Trial:
    """One trial. A trial that `broke` a constraint is shown but is neither best nor on the front."""

    number: int
    state: Literal["finished", "stopped early", "failed"]
    values: Mapping[str, Value]
    metrics: Mapping[str, float]
    seconds: float
    broke: bool = False


@dataclass(frozen=True)
class StageCost:
    """A stage over all trials: how often it ran and was taken from the store, and the mean seconds of a run."""

    name: str
    ran: int
    reused: int
    seconds: float


@dataclass(frozen=True)
class CampaignData:
    """A campaign, finished or interrupted."""

    name: str
    created: datetime
    model: str
    parameters: Sequence[Parameter]
    trials: Sequence[Trial]
    #: What was searched for, such as accuracy on the held-out suite.
    objective: Metric
    #: What it is weighed against, such as the KL divergence from the SFT model.
    against: Metric | None = None
    #: Objective of the model that every trial starts from.
    start: float | None = None
    #: Parameter name -> share of the objective's variance that it explains, in [0, 1].
    importance: Mapping[str, float] = field(default_factory=dict)
    #: Number of the best trial.
    best: int | None = None
    stages: Sequence[StageCost] = ()
    wall_seconds: float = 0.0
    #: Constraints in words, such as "KL below 0.1".
    constraints: Sequence[str] = ()
    #: The best config, as YAML that `allo align` takes.
    best_config: str = ""

    def trial(self, number: int | None) -> Trial | None:
        return next((trial for trial in self.trials if trial.number == number), None)

    def measured(self, *metrics: Metric) -> list[Trial]:
        """Trials that have all of the metrics."""
        return [trial for trial in self.trials if all(metric.name in trial.metrics for metric in metrics)]


def front(trials: Sequence[Trial], objective: Metric, against: Metric) -> list[Trial]:
    """Trials that no other beats in both metrics (and that broke no constraint), ordered by `against`."""

    def cost(trial: Trial) -> tuple[float, float]:
        sign_a, sign_b = (-1 if metric.maximise else 1 for metric in (objective, against))
        return sign_b * trial.metrics[against.name], sign_a * trial.metrics[objective.name]

    kept: list[Trial] = []
    for trial in sorted((trial for trial in trials if not trial.broke), key=cost):
        if not kept or cost(trial)[1] < cost(kept[-1])[1]:
            kept.append(trial)
    return sorted(kept, key=lambda trial: trial.metrics[against.name])
