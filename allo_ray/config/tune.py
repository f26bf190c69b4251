"""The config of a campaign: many runs of one config whose fields are searched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from allo_ray.config.base import PositiveFraction, Section
from allo_ray.config.load import change, load, load_as
from allo_ray.config.run import ClusterConfig, RunConfig
from allo_ray.config.space import Distribution, Value

#: Short names of the method's four thresholds.
SHORT = {"k1": "forget.k", "k2": "learn.k", "u": "forget.u", "v": "learn.v"}


class MeasureConfig(Section):
    """A quantity of a trial's models: `accuracy`, `low` or `high` (ends of its 95 % interval) of a suite, or `kl`.

    kl is the divergence from the SFT model in nats a response; it belongs to no suite.
    """

    metric: Literal["accuracy", "low", "high", "kl"] = "accuracy"
    #: Title of a suite of evaluate.suites.
    suite: str | None = None
    #: The model that is measured, by its name in the tables (ALLO, forgotten ...); by default the last one trained.
    model: str | None = None

    @model_validator(mode="after")
    def _suite_or_kl(self) -> MeasureConfig:
        if (self.metric == "kl") != (self.suite is None):
            raise ValueError("metric: kl has no suite; every other metric needs the title of one in `suite`")
        return self

    @property
    def words(self) -> str:
        """Such as "held-out accuracy"."""
        name = "KL" if self.suite is None else f"{self.suite} {self.metric}"
        return name if self.model is None else f"{name} of {self.model}"


class ObjectiveConfig(MeasureConfig):
    """What is searched for."""

    goal: Literal["maximise", "minimise"] = "maximise"

    @property
    def maximise(self) -> bool:
        return self.goal == "maximise"


class ConstraintConfig(MeasureConfig):
    """A bound on a quantity; a trial that breaks it is shown, but is neither best nor on the front."""

    below: float | None = None
    above: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> ConstraintConfig:
        if (self.below is None) == (self.above is None):
            raise ValueError("give one of `below` and `above`")
        return self

    @property
    def told(self) -> str:
        """Such as "KL below 0.1"."""
        return f"{self.words} " + (
            f"below {self.below:g}" if self.below is not None else f"above {self.above:g}"
        )

    def excess(self, value: float) -> float:
        """How far `value` is beyond the bound; not above 0 where it keeps to it."""
        return value - self.below if self.below is not None else (self.above or 0.0) - value


class TuneConfig(Section):
    """A campaign."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 17
    #: The run that every trial is one of: a preset, or a file (beside this one, or from here).
    base: str
    #: Fields or sections of the base that are other in this campaign, such as {learn.lr: 1e-5}.
    set: dict[str, Any] = Field(default_factory=dict)
    #: Field -> distribution. k1, k2, u and v are short for forget.k, learn.k, forget.u and learn.v.
    space: dict[str, Distribution] = Field(min_length=1)
    #: Number of trials; for searcher grid, which tries every combination, it is known.
    trials: int | None = Field(default=None, ge=1)
    searcher: Literal["tpe", "random", "grid"] = "tpe"
    #: "asha" stops a trial after forgetting when its forgotten model is not among the best `keep`.
    scheduler: Literal["none", "asha"] = "none"
    keep: PositiveFraction = 0.5
    objective: ObjectiveConfig
    #: A second objective: the search then is for the whole front of both.
    second: ObjectiveConfig | None = None
    constraints: tuple[ConstraintConfig, ...] = ()
    #: Trials at a time, at most; by default as many as the cluster has room for.
    concurrent: int | None = Field(default=None, ge=1)
    #: By default the base's.
    cluster: ClusterConfig | None = None

    @model_validator(mode="after")
    def _fits(self) -> TuneConfig:
        fields = [SHORT.get(name, name) for name in self.space]
        if len(set(fields)) < len(fields):
            raise ValueError("space names a field twice (k1 is forget.k, k2 learn.k, u forget.u, v learn.v)")
        continuous = [name for name, told in self.space.items() if not told.values]
        if self.searcher == "grid":
            if continuous:
                raise ValueError(f"searcher: grid needs grid(...) or choice(...) for {', '.join(continuous)}")
            if self.trials not in (None, self.combinations):
                raise ValueError(f"trials: the grid has {self.combinations} combinations; leave `trials` out")
        elif self.trials is None:
            raise ValueError(f"trials is needed for searcher: {self.searcher}")
        if self.scheduler == "asha" and self.second is not None:
            raise ValueError("scheduler: asha compares by one objective; leave `second` or the scheduler out")
        if self.scheduler == "asha" and self.keep == 1:
            raise ValueError("scheduler: asha with keep: 1 stops nothing")
        if self.scheduler == "asha" and self.objective.model is not None:
            raise ValueError("scheduler: asha compares forgotten models; leave objective.model out")
        return self

    @property
    def combinations(self) -> int:
        """Combinations of all choices."""
        product = 1
        for told in self.space.values():
            product *= len(told.values)
        return product

    @property
    def total(self) -> int:
        """Trials of the finished campaign."""
        return self.trials if self.trials is not None else self.combinations


@dataclass(frozen=True)
class Campaign:
    """A campaign's config, with the run that its trials vary."""

    config: TuneConfig
    base: RunConfig

    def run(self, values: Mapping[str, Value]) -> RunConfig:
        """The run with these values of the space.

        Raises:
            UserError: the run's config does not allow them.
        """
        told = ", ".join(f"{name} = {value}" for name, value in values.items())
        fields = {SHORT.get(name, name): value for name, value in values.items()}
        return change(self.base, fields, f"campaign {self.config.name}, space: {told}")


def load_campaign(source: str | Path, overrides: Sequence[str] = ()) -> Campaign:
    """Reads a campaign's YAML, or a preset by its name, and the base that it names.

    Raises:
        UserError: either cannot be read or has a wrong key or value.
    """
    config = load_as(TuneConfig, source, overrides)
    beside = Path(source).parent / config.base
    base = load(beside if beside.is_file() else config.base)
    if config.set:
        base = change(base, config.set, f"{source}: set")
    if config.cluster is not None:
        base = base.model_copy(update={"cluster": config.cluster})
    return Campaign(config, base)
