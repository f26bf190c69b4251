"""A small campaign over cheap stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

CAMPAIGN: dict[str, Any] = {
    "name": "thresholds",
    "base": "qa",
    "set": {
        "model": {"path": "tiny:llama"},
        "evaluate": {"suites": [{"name": "arithmetic", "label": "held-out"}]},
        "trainer": {"workers": 1, "num_cpus": 1, "num_gpus": 0},
        "engine.pool": {"actors": 1, "num_cpus": 1, "num_gpus": 0},
    },
    "space": {"u": "grid(0.7, 0.9)", "v": "grid(0.2, 0.4, 0.6)"},
    "searcher": "grid",
    "objective": {"suite": "held-out"},
}


@pytest.fixture
def write_campaign(tmp_path: Path) -> Callable[..., Path]:
    """Writes a campaign's YAML with changes; `set` is added to. Store and runs lie in the test's folder."""

    def write(**changes: Any) -> Path:
        told = CAMPAIGN | changes
        places = {"store": str(tmp_path / "store"), "runs": str(tmp_path / "runs")}
        told["set"] = {**CAMPAIGN["set"], **places, **changes.get("set", {})}
        file = tmp_path / "campaign.yaml"
        file.write_text(yaml.safe_dump(told))
        return file

    return write
