"""What running trainers and engines tell Prometheus, through Ray's own endpoint on every node.

Ray puts `ray_` before each name, `_total` behind a counter, and the worker and node into the labels.
`cluster/grafana-dashboard.json` shows these metrics.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

#: Seconds between two looks at an engine's queue.
LOOK_SECONDS = 2.0


class TrainMetrics:
    """Figures of one training job, set after each optimiser step by its first worker; label `stage`."""

    def __init__(self, stage: str) -> None:
        self._tags = {"stage": stage}

        def gauge(name: str, description: str) -> Gauge:
            return Gauge(f"allo_train_{name}", description, ("stage",))

        self._step = gauge("step", "Optimiser steps done")
        self._rate = gauge("tokens_per_second", "Tokens read by all workers in a second of the last step")
        self._of_row = {
            "loss": gauge("loss", "Loss of the last step's global batch"),
            "margin": gauge(
                "margin", "Mean margin between chosen and rejected responses, in units of the loss"
            ),
            "grad_norm": gauge("grad_norm", "Norm of the gradient over the trained neurons, before clipping"),
        }

    def step(self, row: Mapping[str, Any]) -> None:
        """Takes a row of METRICS; what its method does not have stays as it is."""
        self._step.set(row["step"] + 1, self._tags)
        self._rate.set(row["tokens_per_second"], self._tags)
        for name, gauge in self._of_row.items():
            gauge.set(row[name], self._tags)


class EngineMetrics:
    """Figures of one engine: what it has done by `stage`, and every two seconds what it is doing."""

    def __init__(self, gauges: Callable[[], Mapping[str, float]]) -> None:
        """`gauges`: see `allo_ray.engines.base.Engine.gauges`."""
        self._gauges = gauges
        self._rows = Counter("allo_engine_rows", "Input rows answered, rejected or given up", ("stage",))
        self._tokens_in = Counter("allo_engine_tokens_in", "Tokens read", ("stage",))
        self._tokens_out = Counter("allo_engine_tokens_out", "Tokens generated, or scored", ("stage",))
        self._running = Gauge("allo_engine_running", "Requests under way")
        self._waiting = Gauge("allo_engine_waiting", "Requests that wait for room in the engine")
        self._cached = Gauge(
            "allo_engine_cached_share", "Share of all prompt tokens found in the prefix cache"
        )
        threading.Thread(target=self._watch, daemon=True, name="metrics").start()

    def batch(self, stage: str, rows: int, tokens_in: int, tokens_out: int) -> None:
        """Counts an answered batch."""
        for counter, value in (
            (self._rows, rows),
            (self._tokens_in, tokens_in),
            (self._tokens_out, tokens_out),
        ):
            if value:
                counter.inc(value, {"stage": stage})

    def _watch(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            told = self._gauges()
            self._running.set(told["running"])
            self._waiting.set(told["waiting"])
            self._cached.set(told["cached_tokens"] / max(1, told["prompt_tokens"]))
