"""Questions of several trials answered by one start of the engines.

An engine takes seconds to minutes to start; the questions of one small trial take it less. So trials hand their
questions to the desk, an actor beside the driver. It starts engines at once for work that takes longer than they take
to start. Smaller work waits for others' to come along, at most as long as `PATIENCE` starts take; then all that lies
there is answered together. A trial that waits holds no CPU and no GPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from allo_ray.config.engine import EngineConfig
from allo_ray.data.task_errors import users_error
from allo_ray.results import KL
from allo_ray.session import quiet
from allo_ray.stages.answers import Asked, Spent, answer
from allo_ray.stages.base import Progress
from allo_ray.store import Artifact, Store
from allo_ray.tune.beside import beside_driver

#: Starts that small work waits for company. 16 trials of the smoke preset, four at a time on two cores, started
#: engines nine times where this was 1.
PATIENCE = 3


@dataclass(eq=False)
class _Call:
    """What one trial asks. `spent`, or `error`, is there when it is answered."""

    asked: Asked
    engine: EngineConfig
    store: str
    came: float = field(default_factory=time.monotonic)
    spent: Spent | None = None
    error: Exception | None = None

    @property
    def answered(self) -> bool:
        return self.spent is not None or self.error is not None

    @property
    def requests(self) -> int:
        return sum(len(job.rows) * job.work.requests for job in self.asked.values())  # type: ignore[arg-type]


class Desk:
    """Takes calls from several threads; the first one that may start answers all that lie there."""

    def __init__(self, startup: float = 0.0, per_request: float = 0.0) -> None:
        """Seconds that engines took to start, and for each request then; where that is not known calls do not wait."""
        quiet()
        self._turn = threading.Condition()
        self._waiting: list[_Call] = []
        #: What is being answered: a trial that was lost and asks again waits for its first call.
        self._under_way: set[tuple[str, str]] = set()
        #: As the last engines took them.
        self._startup, self._per_request = startup, per_request

    def answer(self, asked: Asked, engine: EngineConfig, store: str) -> Spent:
        """See `stages.answers.Answer`; `store` is its root."""
        call = _Call(asked, engine, store)
        with self._turn:
            self._waiting.append(call)
            self._turn.notify_all()
        while True:
            with self._turn:
                while not call.answered and not self._may_start(call):
                    self._turn.wait(1.0)
                if call.answered:
                    break
                together = [one for one in self._waiting if self._goes_with(call, one)]
                self._waiting = [one for one in self._waiting if one not in together]
                keys = {key for one in together for key in one.asked}
                self._under_way |= keys
            try:
                self._serve(together)
            finally:
                with self._turn:
                    self._under_way -= keys
                    self._turn.notify_all()
        if call.error is not None:
            raise call.error
        assert call.spent is not None, "answered"
        return call.spent

    def _may_start(self, call: _Call) -> bool:
        if call not in self._waiting or self._under_way & call.asked.keys():  # another thread is at it
            return False
        work = self._per_request * sum(one.requests for one in self._waiting)
        return work >= self._startup or time.monotonic() - call.came >= PATIENCE * self._startup

    def _goes_with(self, call: _Call, one: _Call) -> bool:
        return (one.engine, one.store) == (call.engine, call.store) and not self._under_way & one.asked.keys()

    def _serve(self, calls: Sequence[_Call]) -> None:
        """Answers calls with one pool of engines; where that fails, each with one of its own."""
        store = Store(calls[0].store)
        asked = {key: job for call in calls for key, job in call.asked.items() if store.find(*key) is None}
        began = time.monotonic()
        try:
            startup = answer(asked, calls[0].engine, store).startup if asked else 0.0
        except Exception as error:
            if len(calls) > 1:
                for call in calls:
                    self._serve([call])
            else:
                calls[0].error = error
            return
        ended, requests = time.monotonic(), sum(call.requests for call in calls)
        per_request = (ended - began - startup) / requests
        if asked:
            self._startup, self._per_request = startup, per_request
        for call in calls:
            own = startup / len(calls) + per_request * call.requests
            call.spent = Spent(startup / len(calls), max(0.0, ended - call.came - own))


def open_desk(callers: int, evaluated: Artifact | None = None) -> Any:
    """Starts the desk on this node, for so many callers at a time; it is replaced if it dies.

    `evaluated`: an evaluation that tells how long engines take.
    """
    known: tuple[float, ...] = ()
    if evaluated is not None and evaluated.startup_seconds > 0:
        facts = evaluated.facts
        requests = len(facts["models"]) * sum(facts["counts"].values())
        requests += sum(told["n"] for told in facts.get(KL, {}).values())
        known = evaluated.startup_seconds, (evaluated.seconds - evaluated.startup_seconds) / requests
    return beside_driver(Desk, *known, max_restarts=-1, max_task_retries=-1, max_concurrency=callers)


@dataclass(frozen=True)
class AtTheDesk:
    """A trial's `stages.answers.Answer`."""

    desk: Any

    def __call__(self, asked: Asked, engine: EngineConfig, store: Store, progress: Progress, /) -> Spent:
        with users_error():
            return ray.get(self.desk.answer.remote(asked, engine, store.root))
