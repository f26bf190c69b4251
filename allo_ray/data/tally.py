"""Figures of a batch job, added up shard by shard: the driver holds as much for a million shards as for one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_SUMMED = ("rejected", "killed", "tokens_in", "tokens_out")
#: See `allo_ray.engines.base.Engine.gauges`.
_GAUGES = ("running", "waiting", "cached_tokens", "prompt_tokens")


@dataclass
class Tally:
    """Sums and extremes over the shards of one job; times are seconds since the epoch."""

    sums: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_SUMMED, 0))
    ready: float = float("inf")
    started: float = float("inf")
    ended: float = 0.0
    engine_seconds: float = 0.0
    peak_private_bytes: int = 0
    #: Actor -> CPU seconds that it has used so far.
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    #: Actor -> what its engine was doing when it told of its last shard.
    engines: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def add(self, told: Mapping[str, Any]) -> None:
        """Counts what an actor tells of one shard (see `InferenceActor`)."""
        for name in _SUMMED:
            self.sums[name] += told[name]
        self.ready = min(self.ready, told["ready"])
        self.started = min(self.started, told["started"])
        self.ended = max(self.ended, told["ended"])
        self.engine_seconds = max(self.engine_seconds, told["engine_seconds"])
        self.peak_private_bytes = max(self.peak_private_bytes, told["private_bytes"])
        actor = told["actor"]
        self.cpu_seconds[actor] = max(told["cpu_seconds"], self.cpu_seconds.get(actor, 0.0))
        if told["ended"] >= self.engines.get(actor, told)["ended"]:
            self.engines[actor] = {name: told[name] for name in ("ended", *_GAUGES)}

    def summary(self, called: float) -> dict[str, Any]:
        """The figures of `inference.run`, for a job called at `called`."""
        if not self.cpu_seconds:
            return self.sums | {
                "seconds": 0.0,
                "startup_seconds": time.time() - called,
                "engine_seconds": 0.0,
            }
        seconds = self.ended - self.started
        return self.sums | {
            "seconds": seconds,
            "startup_seconds": max(0.0, self.ready - called),
            "engine_seconds": self.engine_seconds,
            "actors": len(self.cpu_seconds),
            "cpu_seconds": sum(self.cpu_seconds.values()),
            "peak_private_bytes": self.peak_private_bytes,
            "tokens_in_per_second": self.sums["tokens_in"] / max(seconds, 1e-3),
            "tokens_out_per_second": self.sums["tokens_out"] / max(seconds, 1e-3),
            "cached": _cached(self.engines.values()),
        }


def rates(tallies: Sequence[Tally]) -> dict[str, float]:
    """Tokens a second over all jobs, since the first engine was ready."""
    seconds = max(one.ended for one in tallies) - min(one.ready for one in tallies)
    return {
        f"{name}_per_second": sum(one.sums[name] for one in tallies) / max(seconds, 1e-3)
        for name in ("tokens_in", "tokens_out")
    }


def gauges(tallies: Sequence[Tally], actors: int) -> dict[str, float]:
    """What all engines together are doing: requests running and waiting, share of the prompt tokens found in the cache.

    Args:
        actors: the most that are alive at a time; of those that told something the newest count.
    """
    newest: dict[str, Mapping[str, Any]] = {}
    for actor, told in sorted(
        (item for one in tallies for item in one.engines.items()), key=lambda item: item[1]["ended"]
    ):
        newest.pop(actor, None)
        newest[actor] = told
    alive = list(newest.values())[-actors:]
    sums = {name: sum(told[name] for told in alive) for name in ("running", "waiting")}
    return sums | {"cached": _cached(newest.values())}


def _cached(engines: Iterable[Mapping[str, Any]]) -> float:
    told = list(engines)
    return sum(one["cached_tokens"] for one in told) / max(1, sum(one["prompt_tokens"] for one in told))
