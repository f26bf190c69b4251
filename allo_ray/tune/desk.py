"""Questions of several trials answered by one start of the engines.

An engine takes seconds to minutes to start; the questions of one small trial take it less. So trials hand their
questions to the desk, an actor beside the driver. It starts engines at once for work that takes longer than they take
to start. Smaller work waits for others' to come along, at most as long as `PATIENCE` starts take and for engines that
are under way; then all that lies there is answered together. A trial that waits holds no CPU and no GPU.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from allo_ray.config.engine import EngineConfig
from allo_ray.data.task_errors import users_error
from allo_ray.session import quiet
from allo_ray.stages.answers import Asked, answer
from allo_ray.stages.base import Progress
from allo_ray.store import Artifact, Store

#: 16 trials of the smoke preset, four at a time, started engines nine times where this was 1.
PATIENCE = 2


@dataclass(eq=False)
class _Call:
    """What one trial asks. `seconds`, or `error`, is there when it is answered."""

    asked: Asked
    engine: EngineConfig
    store: str
    came: float = field(default_factory=time.monotonic)
    seconds: float | None = None
    error: Exception | None = None

    @property
    def answered(self) -> bool:
        return self.seconds is not None or self.error is not None

    @property
    def requests(self) -> int:
        return sum(len(job.rows) * job.work.requests for job in self.asked.values())  # type: ignore[arg-type]


class Desk:
    """Takes calls from several threads; the first one that may start answers all that lie there."""

    def __init__(self, startup: float | None = None, per_request: float = 0.0) -> None:
        """Seconds that engines took to start, and for each request then; where it is not known the first call tells."""
        quiet()
        self._turn = threading.Condition()
        self._waiting: list[_Call] = []
        self._running = 0
        #: As the last engines took them.
        self._startup, self._per_request = startup, per_request

    def answer(self, asked: Asked, engine: EngineConfig, store: str) -> float:
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
                together = [one for one in self._waiting if (one.engine, one.store) == (engine, store)]
                self._waiting = [one for one in self._waiting if one not in together]
                self._running += 1
            try:
                self._serve(together)
            finally:
                with self._turn:
                    self._running -= 1
                    self._turn.notify_all()
        if call.error is not None:
            raise call.error
        assert call.seconds is not None, "answered"
        return call.seconds

    def _may_start(self, call: _Call) -> bool:
        if call not in self._waiting:  # another one's thread serves it
            return False
        if self._startup is None:
            return not self._running
        work = self._per_request * sum(one.requests for one in self._waiting)
        if work >= self._startup:
            return True
        return not self._running and time.monotonic() - call.came >= PATIENCE * self._startup

    def _serve(self, calls: Sequence[_Call]) -> None:
        """Answers calls with one pool of engines; where that fails, each with one of its own."""
        asked = {key: job for call in calls for key, job in call.asked.items()}
        began = time.monotonic()
        try:
            startup = answer(asked, calls[0].engine, Store(calls[0].store))
        except Exception as error:
            if len(calls) > 1:
                for call in calls:
                    self._serve([call])
            else:
                calls[0].error = error
            return
        self._startup = startup
        self._per_request = (time.monotonic() - began - startup) / sum(call.requests for call in calls)
        for call in calls:
            call.seconds = startup


def open_desk(callers: int, evaluated: Artifact | None = None) -> Any:
    """Starts the desk on this node, for so many callers at a time; it reserves nothing, and is replaced if it dies.

    `evaluated`: an evaluation that tells how long engines take.
    """
    known: tuple[float, ...] = ()
    if evaluated is not None and evaluated.startup_seconds > 0:
        requests = len(evaluated.facts["models"]) * sum(evaluated.facts["counts"].values())
        known = evaluated.startup_seconds, (evaluated.seconds - evaluated.startup_seconds) / requests
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = dict(num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=callers)
    return ray.remote(Desk).options(scheduling_strategy=here, **options).remote(*known)


@dataclass(frozen=True)
class AtTheDesk:
    """A trial's `stages.answers.Answer`."""

    desk: Any

    def __call__(self, asked: Asked, engine: EngineConfig, store: Store, progress: Progress, /) -> float:
        with users_error():
            return ray.get(self.desk.answer.remote(asked, engine, store.root))
