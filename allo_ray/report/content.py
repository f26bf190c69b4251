"""Everything a report shows, as plain values. Shares and probabilities lie in [0, 1]; times are seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa


@dataclass(frozen=True)
class ModelScores:
    """One model on one suite: `correct` of `n` questions, and the ends of the 95 % interval of that share."""

    label: str
    suite: str
    correct: int
    n: int
    low: float
    high: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.n if self.n else float("nan")


@dataclass(frozen=True)
class Comparison:
    """A paired comparison: `gain` is the accuracy of `a` minus that of `b`, `p` is two-sided."""

    a: str
    b: str
    suite: str
    gain: float
    p: float


@dataclass(frozen=True)
class Divergence:
    """KL(SFT || model) per response in nats, estimated on `n` of the SFT model's samples."""

    mean: float | None
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class Negative:
    """A rejected response token by token, with what it was compared with.

    `p_re` and `q` are as long as `tokens`, or empty where the run has no such stage. q is 1 for a kept token
    and 0 for one that the learning loss drops (Eq. 8).
    """

    prompt: str
    reference: str | None
    chosen: str
    rewrite: str | None
    tokens: Sequence[str]
    p_re: Sequence[float] = ()
    q: Sequence[float] = ()

    def __post_init__(self) -> None:
        for values in (self.p_re, self.q):
            assert len(values) in (0, len(self.tokens)), (len(values), len(self.tokens))


@dataclass(frozen=True)
class StageTime:
    """Seconds that a stage took in this run; `startup_seconds` of them passed before its first row or step."""

    name: str
    seconds: float
    startup_seconds: float = 0.0
    cached: bool = False


@dataclass(frozen=True)
class ReportData:
    """A finished run. What a run does not have (no forgetting, no transfer suite ...) is left empty or None.

    `models` come in the order in which they are shown, all suites of a model or all models of a suite together;
    the first suite is the held-out one. The first comparison is the report's verdict.
    """

    name: str
    created: datetime
    model: str
    config: Mapping[str, Any]
    models: Sequence[ModelScores]
    comparisons: Sequence[Comparison]
    #: Model label -> how far it is from the SFT model.
    divergences: Mapping[str, Divergence] = field(default_factory=dict)
    #: How the samples of the divergences were drawn, where that was not from the SFT model's own distribution.
    drawn: str = ""
    #: Trained stage -> METRICS table.
    curves: Mapping[str, pa.Table] = field(default_factory=dict)
    #: "k1" (forget) and "k2" (learn) -> tensor name -> (selected neurons, all neurons).
    selections: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    #: P_re of every scored token, [tokens] float.
    p_re: np.ndarray | None = None
    u: float | None = None
    #: Share of the scored tokens with r = 1 (P_re < u).
    kept_by_u: float | None = None
    v: float | None = None
    negatives: Sequence[Negative] = ()
    #: Whose probabilities the shown q were computed with.
    q_model: str = "the aligned model"
    stages: Sequence[StageTime] = ()
    #: What was counted -> rows, such as {"pairs": 512}.
    counts: Mapping[str, int] = field(default_factory=dict)
    #: Reason -> rows dropped for it.
    drops: Mapping[str, int] = field(default_factory=dict)
    #: Package -> version, for whoever repeats the run.
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def suites(self) -> list[str]:
        return list(dict.fromkeys(score.suite for score in self.models))

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(score.label for score in self.models))

    def score(self, label: str, suite: str) -> ModelScores | None:
        return next((score for score in self.models if (score.label, score.suite) == (label, suite)), None)
