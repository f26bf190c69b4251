"""What is known of a campaign's trials: one small JSON file a trial in runs/<campaign>/trials/.

They are all that a campaign resumes from, beside the store: a search is a function of the records (see search.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from allo_ray.config.base import semantic
from allo_ray.config.load import dump
from allo_ray.config.space import Value
from allo_ray.config.tune import Campaign, load_campaign

State = Literal["running", "finished", "stopped early", "failed"]
#: Model label -> suite title, or "kl" -> metric -> value.
Scores = dict[str, dict[str, dict[str, Any]]]

RESOLVED, BASE = "campaign.resolved.yaml", "base.resolved.yaml"


@dataclass
class Record:
    """One trial. `early` holds the scores after forgetting, where they were asked for."""

    number: int
    values: dict[str, Value]
    state: State = "running"
    scores: Scores = field(default_factory=dict)
    early: Scores = field(default_factory=dict)
    #: Node of the graph -> <stage>/<key> in the store.
    artifacts: dict[str, str] = field(default_factory=dict)
    #: Of the attempt that ended it.
    seconds: float = 0.0
    error: str = ""


class Records:
    """The trials of a campaign by number, kept in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._trials: dict[int, Record] = {}
        for file in sorted((folder / "trials").glob("*.json")):
            record = Record(**json.loads(file.read_text(encoding="utf-8")))
            self._trials[record.number] = record
        clock = folder / "clock.json"
        self._before = json.loads(clock.read_text())["seconds"] if clock.exists() else 0.0
        self._opened = time.monotonic()

    def __iter__(self) -> Iterator[Record]:
        return iter(sorted(self._trials.values(), key=lambda record: record.number))

    def __len__(self) -> int:
        return len(self._trials)

    @property
    def ended(self) -> list[Record]:
        """Trials that need no further work: finished, or stopped early. Failed ones are tried again."""
        return [record for record in self if record.state in ("finished", "stopped early")]

    @property
    def wall_seconds(self) -> float:
        """Time spent on the campaign, all attempts together."""
        return self._before + time.monotonic() - self._opened

    def save(self, record: Record) -> None:
        """Writes a trial's record, and the campaign's clock."""
        self._trials[record.number] = record
        _replace(self.folder / "trials" / f"{record.number:04d}.json", asdict(record))
        _replace(self.folder / "clock.json", {"seconds": round(self.wall_seconds, 1)})


def folder_of(campaign: Campaign) -> Path:
    """runs/<name>, or runs/<name>-2 and so on where another campaign of that name is there already.

    The same campaign may have more trials, other resources, or another `concurrent`.
    """
    base = Path(campaign.base.runs) / campaign.config.name
    for number in range(1, 10_000):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        resolved = folder / RESOLVED
        if not folder.exists() or (
            resolved.is_file() and _identity(load_campaign(resolved)) == _identity(campaign)
        ):
            return folder
    raise AssertionError("ten thousand campaigns of one name")


def claim(campaign: Campaign) -> Path:
    """Makes the campaign's folder and writes its config, by which the next attempt finds it; `allo tune` takes it."""
    folder = folder_of(campaign)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / BASE).write_text(dump(campaign.base), encoding="utf-8")
    resolved = campaign.config.model_copy(update={"base": BASE, "set": {}})
    part = folder / f"{RESOLVED}.part"
    part.write_text(dump(resolved), encoding="utf-8")
    part.replace(folder / RESOLVED)
    return folder


def _identity(campaign: Campaign) -> dict[str, Any]:
    """What makes it this campaign and no other."""
    told = semantic(campaign.config)
    return {
        **{
            name: told[name]
            for name in told
            if name not in ("base", "set", "trials", "concurrent", "cluster")
        },
        "base": semantic(campaign.base),
    }


def _replace(path: Path, told: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(told, indent=1), encoding="utf-8")
    part.replace(path)
