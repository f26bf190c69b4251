"""Small work of several trials done together, by one start of the engines or of the trainers.

Engines and trainers take seconds to minutes to start; the questions of one small trial take less, and so may the steps
of its training. So trials hand both to the desk, an actor beside the driver. What takes longer than its start it hands
back, and the trial does that at once, itself. Smaller work waits for others' to come along, at most as long as
`PATIENCE` starts take. One pool of engines answers all that lies there; trainers train one job after the other, and so
take no more than fills that time. A trial that waits holds no CPU and no GPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray

from allo_ray.config.engine import EngineConfig
from allo_ray.data.task_errors import users_error
from allo_ray.results import KL
from allo_ray.session import quiet
from allo_ray.spent import Spent
from allo_ray.stages.answers import Asked, answer
from allo_ray.stages.base import Progress
from allo_ray.store import Artifact, Store
from allo_ray.train.driver import alone
from allo_ray.train.fit import fit_all
from allo_ray.train.job import TrainJob
from allo_ray.tune.beside import beside_driver
from allo_ray.tune.measure import EVALUATE

#: Starts that small work waits for company (measured beside 1: docs/campaigns.md, What it costs).
PATIENCE = 3
#: Seconds of a start that count at most: the rest was a wait for nodes, or workers that were lost.
LONGEST = 120.0
#: Calls that wait or are served at a time, at least; each holds a thread.
THREADS = 64


class Pace(NamedTuple):
    """Seconds that a start takes, and each unit of work then; where they are not known all work is large."""

    startup: float = 0.0
    per_unit: float = 0.0

    @classmethod
    def of(cls, startup: float, per_unit: float) -> Pace:
        """As they were measured."""
        return cls(min(startup, LONGEST), per_unit)


Serve = Callable[[Sequence["_Call"]], Pace | None]


@dataclass(eq=False)
class _Call:
    """What one trial asks. `spent`, or `error`, is there when it is served.

    serve: does the work of calls that agree in `kind`, and gives its pace, None where there was none left. keys: what
    comes of it. units: how much it is, requests or rows.
    """

    serve: Serve
    kind: object
    work: Any
    keys: Collection[Hashable]
    units: int
    came: float = field(default_factory=time.monotonic)
    spent: Spent | None = None
    error: BaseException | None = None

    @property
    def served(self) -> bool:
        return self.spent is not None or self.error is not None


class Desk:
    """Takes calls from several threads; the first one that may start serves all that go with it."""

    def __init__(self, trials: int, engines: Pace, trainers: Pace) -> None:
        """For so many trials at a time; `engines`, `trainers`: their pace so far."""
        quiet()
        self._trials = trials
        #: Those that wait for what other ones make.
        self._away: set[int] = set()
        self._turn = threading.Condition()
        self._waiting: list[_Call] = []
        #: What is being made: a trial that was lost and asks again waits for its first call.
        self._under_way: set[Hashable] = set()
        #: As they were the last time.
        self._paces: dict[Serve, Pace] = {_answer: engines, _train: trainers}

    def answer(self, trial: int, asked: Asked, engine: EngineConfig, root: str) -> Spent | None:
        """See `stages.base.Desk`; `root` is the store's. None: it is large."""
        requests = sum(len(job.rows) * job.work.requests for job in asked.values())  # type: ignore[arg-type]
        return self._served(trial, _Call(_answer, (engine, root), asked, asked.keys(), requests))

    def fit(self, trial: int, job: TrainJob, steps: int) -> Spent | None:
        """See `stages.base.Desk`. None: it is large."""
        rows = steps * job.config.batch_size
        return self._served(trial, _Call(_train, job.trainer, (job, steps), {job.out}, rows))

    @ray.method(concurrency_group="words")
    def expect(self, trials: int) -> None:
        """So many trials bring work from now on."""
        with self._turn:
            self._trials = trials
            self._turn.notify_all()

    @ray.method(concurrency_group="words")
    def away(self, trial: int, waits: bool) -> None:
        """This trial waits for what another one makes, or no longer."""
        with self._turn:
            (self._away.add if waits else self._away.discard)(trial)
            self._turn.notify_all()

    def _served(self, trial: int, call: _Call) -> Spent | None:
        with self._turn:
            self._away.discard(trial)  # one that was lost may not have said so
            if self._seconds([call]) >= self._paces[call.serve].startup and not self._busy(call):
                return None
            self._waiting.append(call)
            self._turn.notify_all()
        while True:
            with self._turn:
                while not call.served and not self._may_start(call):
                    self._turn.wait(1.0)
                if call.served:
                    break
                together = self._together(call)
                self._waiting = [one for one in self._waiting if one not in together]
                keys = {key for one in together for key in one.keys}
                self._under_way |= keys
            try:
                self._serve(together)
            finally:
                with self._turn:
                    self._under_way -= keys
                    self._turn.notify_all()
        if call.error is not None:
            raise call.error
        assert call.spent is not None, "served"
        return call.spent

    def _may_start(self, call: _Call) -> bool:
        if call not in self._waiting or self._busy(call):  # another thread is at it
            return False
        startup = self._paces[call.serve].startup
        waited = time.monotonic() - call.came
        if self._seconds(self._together(call)) >= startup or waited >= PATIENCE * startup:
            return True
        # Nobody else can come, until those of the longer line were served.
        coming = self._trials - len(self._away) - len(self._waiting)
        line = [one for one in self._waiting if one.serve is call.serve]
        return coming <= 0 and 2 * len(line) >= len(self._waiting)

    def _together(self, call: _Call) -> list[_Call]:
        together, most = [call], PATIENCE * self._paces[call.serve].startup
        for one in self._waiting:
            if one is call or (one.serve, one.kind) != (call.serve, call.kind) or self._busy(one):
                continue
            if call.serve is _answer or self._seconds([*together, one]) <= most:
                together.append(one)
        return together

    def _busy(self, call: _Call) -> bool:
        return not self._under_way.isdisjoint(call.keys)

    def _seconds(self, calls: Sequence[_Call]) -> float:
        return sum(self._paces[call.serve].per_unit * call.units for call in calls)

    def _serve(self, calls: Sequence[_Call]) -> None:
        """Serves calls with one start; where that fails, each with one of its own."""
        try:
            pace = calls[0].serve(calls)
        except BaseException as error:  # nobody else would ever serve these calls
            if len(calls) > 1:
                for call in calls:
                    self._serve([call])
            else:
                calls[0].error = error
            return
        if pace is not None:
            self._paces[calls[0].serve] = pace


def _answer(calls: Sequence[_Call]) -> Pace | None:
    engine, root = calls[0].kind  # type: ignore[misc]
    asked = {place: job for call in calls for place, job in call.work.items()}
    began = time.monotonic()
    startup, held = answer(asked, engine, Store(root))
    ended = time.monotonic()
    per_request = (ended - began - held - startup) / sum(call.units for call in calls)
    for call in calls:
        own = startup / len(calls) + per_request * call.units
        call.spent = Spent(startup / len(calls), max(0.0, ended - call.came - own))
    return Pace.of(startup, per_request) if startup else None


def _train(calls: Sequence[_Call]) -> Pace | None:
    began = time.monotonic()
    spent = fit_all([call.work for call in calls])
    ended = time.monotonic()
    for call, (startup, waited) in zip(calls, spent, strict=True):
        call.spent = Spent(startup, waited + began - call.came)
    startup = sum(one.startup for one in spent)
    own = sum(ended - began - one.startup - one.waited for one in spent)
    return Pace.of(startup, own / sum(call.units for call in calls)) if startup else None


def open_desk(trials: int, made: Mapping[str, Artifact]) -> Any:
    """Starts the desk on this node, for so many trials at a time; it is replaced if it dies.

    `made`: artifacts of all trials by node; those of the evaluation and the warm-up tell how long starts take.
    """
    engines = trainers = Pace()
    evaluated, trained = made.get(EVALUATE), made.get("warmup")
    if evaluated is not None and evaluated.startup_seconds > 0:
        facts = evaluated.facts
        requests = len(facts["models"]) * sum(facts["counts"].values())
        requests += sum(told["n"] for told in facts.get(KL, {}).values())
        engines = Pace.of(
            evaluated.startup_seconds, (evaluated.seconds - evaluated.startup_seconds) / requests
        )
    if trained is not None:
        startup = trained.facts["timeline"]["worker_started"]
        trainers = Pace.of(startup, (trained.facts["seconds"] - startup) / trained.facts["rows"])
    return beside_driver(
        Desk,
        trials,
        engines,
        trainers,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=max(THREADS, 2 * trials),
        concurrency_groups={"words": 1},
    )


@dataclass(frozen=True)
class AtTheDesk:
    """A trial's `stages.base.Desk`."""

    desk: Any
    trial: int

    def answer(self, asked: Asked, engine: EngineConfig, store: Store, progress: Progress) -> Spent:
        with users_error():
            spent: Any = ray.get(self.desk.answer.remote(self.trial, asked, engine, store.root))
        return answer(asked, engine, store, progress) if spent is None else spent

    def fit(self, job: TrainJob, steps: int) -> Spent:
        with users_error():
            spent: Any = ray.get(self.desk.fit.remote(self.trial, job, steps))
        return alone(job, steps) if spent is None else spent

    @contextmanager
    def away(self) -> Iterator[None]:
        self.desk.away.remote(self.trial, True)
        try:
            yield
        finally:
            self.desk.away.remote(self.trial, False)
