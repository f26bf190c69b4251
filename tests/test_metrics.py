"""Names of exported metrics and the dashboard that shows them agree."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.util.metrics import Counter, Metric

from allo_ray.metrics import EngineMetrics, TrainMetrics

DASHBOARD = Path(__file__).resolve().parents[1] / "cluster" / "grafana-dashboard.json"


def exported(owner: Any) -> Iterator[str]:
    """Names at Ray's endpoint: `ray_` before each, `_total` behind a counter."""
    for value in vars(owner).values():
        for metric in value.values() if isinstance(value, dict) else [value]:
            if isinstance(metric, Metric):
                yield f"ray_{metric.info['name']}" + ("_total" if isinstance(metric, Counter) else "")


def test_the_dashboard_shows_every_exported_metric_and_no_other() -> None:
    told = {"running": 0.0, "waiting": 0.0, "cached_tokens": 0.0, "prompt_tokens": 0.0}
    there = {*exported(TrainMetrics("stage")), *exported(EngineMetrics(lambda: told))}
    panels = json.loads(DASHBOARD.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    shown = {name for expression in expressions for name in re.findall(r"\bray_allo_\w+", expression)}
    assert len(there) == 11
    assert shown == there
