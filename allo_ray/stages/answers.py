"""What models are asked, answered by one pool of engines and published: an artifact for each model and question."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from allo_ray.config.engine import EngineConfig
from allo_ray.data.inference import Job, run
from allo_ray.stages.base import Progress
from allo_ray.store import Store

#: (stage, key) of the artifact that is to be -> what makes it. Models are of one architecture.
Asked = Mapping[tuple[str, str], Job]


class Spent(NamedTuple):
    """Seconds until the first engine was ready, and seconds that passed for others' sake."""

    startup: float
    waited: float = 0.0


class Answer(Protocol):
    """Publishes all that is asked.

    Raises:
        UserError: as `data.inference.run`.
    """

    def __call__(self, asked: Asked, engine: EngineConfig, store: Store, progress: Progress, /) -> Spent: ...


def answer(asked: Asked, engine: EngineConfig, store: Store, progress: Progress | None = None, /) -> Spent:
    """See `Answer`."""
    facts = run(list(asked.values()), engine, progress)
    for told, (stage, key) in zip(facts, asked, strict=True):
        store.publish(stage, key, {"facts": told, "seconds": told["seconds"], "startup_seconds": 0})
    # Of a job of which nothing was left to do it is the time of the whole run.
    return Spent(min(told["startup_seconds"] for told in facts))
