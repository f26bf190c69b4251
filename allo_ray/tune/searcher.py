"""Ray Tune's view of a campaign: a searcher that hands out trials and writes down what became of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from allo_ray.config.tune import Campaign
from allo_ray.report.campaign_figures import worded
from allo_ray.tune.measure import value_of
from allo_ray.tune.records import Record, Records
from allo_ray.tune.search import suggest
from allo_ray.tune.trial import FOUND, OBJECTIVE, STEP
from allo_ray.tune.watch import Watch


class CampaignSearcher(Searcher):
    """Interrupted and failed trials first, with the values they had; then new ones, as `search.suggest` says.

    Its state are the records in the campaign's folder, so it has none to save with Tune's.
    """

    def __init__(
        self, campaign: Campaign, records: Records, watch: Watch, desk: Any, at_once: Callable[[], int]
    ) -> None:
        """`at_once`: how many trials the cluster has room for, whenever that is asked."""
        super().__init__()
        self.campaign, self.records, self.watch, self.desk = campaign, records, watch, desk
        self.at_once = at_once
        self._again = [record for record in records if record not in records.ended]
        self._running: dict[str, Record] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """What `trial` is given as its first argument; None while there is no room for another one."""
        if not self._again and len(self.records) >= self.campaign.config.total:
            return Searcher.FINISHED
        if not self._expect():
            return None
        if self._again:
            record = Record(self._again[0].number, self._again.pop(0).values)
        else:
            number = len(self.records)
            record = Record(number, suggest(self.campaign.config, self.records, number))
        self._running[trial_id] = record
        self.records.save(record)
        self.watch.started(record.number, record.values)
        return {"number": record.number, "values": record.values}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Notes what a trial reports before it ends."""
        if result.get(STEP) == 1:
            record = self._running[trial_id]
            record.early = json.loads(result[FOUND])["scores"]
            self.records.save(record)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Notes how a trial ended."""
        record, told = self._running.pop(trial_id), result or {}
        found = json.loads(told.get(FOUND, "{}"))
        record.seconds = told.get("seconds", 0.0)
        record.artifacts = found.get("artifacts", {})
        if error:
            trace = self.watch.trace(record.number)
            record.state, record.error = (
                "failed",
                trace or "its process died, more often than it was tried again",
            )
        elif told.get(STEP) == 2:
            record.state, record.scores = "finished", found["scores"]
        elif told.get(STEP) == 1:
            record.state, record.early = "stopped early", found["scores"]
        else:
            record.state, record.error = "failed", told.get("error", "it ended without a result")
        self.records.save(record)
        self.watch.ended(record.number, self._words(record))
        self.desk.away.remote(record.number, False)
        self._expect()

    def _expect(self) -> int:
        """How many trials may start now; the desk is told how many bring work then."""
        left = len(self._again) + self.campaign.config.total - len(self.records)
        more = min(left, max(0, self.at_once() - len(self._running)))
        self.desk.expect.remote(len(self._running) + more)
        return more

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its searcher when it starts."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see the class."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see the class."""

    def _words(self, record: Record) -> str:
        if record.state == "failed":
            return f"failed: {record.error.strip().splitlines()[-1]};"
        goal = self.campaign.config.objective
        value = value_of(goal, record.scores or record.early)
        return f"{record.state}: {goal.words} {worded(value)};"


def scheduler_of(campaign: Campaign, records: Records) -> TrialScheduler:
    """None, or ASHA with the trials of earlier attempts in its rungs.

    ASHA's only rung is the forgotten model: its objective is compared with that of the forgotten models so far, and a
    trial that is not among the best `keep` of them ends there, without learning. What it saves is learning and the
    last evaluation; what it costs is one more start of the engines a trial.
    """
    config = campaign.config
    if config.scheduler == "none":
        return FIFOScheduler()
    scheduler = AsyncHyperBandScheduler(
        time_attr=STEP,
        metric=OBJECTIVE,
        mode="max" if config.objective.maximise else "min",
        grace_period=1,
        max_t=2,
        reduction_factor=1 / config.keep,
    )
    for record in records.ended:
        if record.early:
            earlier = cast(Any, SimpleNamespace(trial_id=f"earlier-{record.number}"))
            scheduler.on_trial_add(cast(Any, None), earlier)
            value = value_of(config.objective, record.early)
            scheduler.on_trial_result(cast(Any, None), earlier, {STEP: 1, OBJECTIVE: value})
    return scheduler
