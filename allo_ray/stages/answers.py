"""What models are asked, answered by one pool of engines and published: an artifact for each model and question."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack

from allo_ray.config.engine import EngineConfig
from allo_ray.data.inference import Job, run
from allo_ray.spent import Spent
from allo_ray.stages.base import Progress
from allo_ray.store import Store

#: (stage, key) of the artifact that is to be -> what makes it. Models are of one architecture.
Asked = Mapping[tuple[str, str], Job]


def answer(asked: Asked, engine: EngineConfig, store: Store, progress: Progress | None = None) -> Spent:
    """Publishes what is asked and not there yet. Waits for whoever is at any of it.

    Raises:
        UserError: as `data.inference.run`.
    """
    with ExitStack() as leases:
        began = time.monotonic()
        for place in sorted(asked):
            if store.find(*place) is None:  # nobody waits for what is there
                leases.enter_context(store.lease(*place))
        waited = time.monotonic() - began
        missing = {place: job for place, job in asked.items() if store.find(*place) is None}
        if not missing:
            return Spent(0.0, waited)
        facts = run(list(missing.values()), engine, progress)
        for told, place in zip(facts, missing, strict=True):
            store.publish(*place, {"facts": told, "seconds": told["seconds"], "startup_seconds": 0})
    # Of a job of which nothing was left to do it is the time of the whole run.
    return Spent(min(told["startup_seconds"] for told in facts), waited)
