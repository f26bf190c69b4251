"""One trial: the pipeline of one run, in a process somewhere in the cluster that serves one trial after the other.

It is a plain function for Ray Tune. What it needs of the cluster its stages ask for themselves, outside of the trial's
own reservation (Ray Data and Ray Train leave the placement group that Tune puts a trial into).
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console

from allo_ray import pipeline, results, track
from allo_ray.config.tune import Campaign
from allo_ray.errors import UserError
from allo_ray.pipeline import Done
from allo_ray.report.terminal import Progress
from allo_ray.results import KL
from allo_ray.session import quiet
from allo_ray.store import Store
from allo_ray.tune.desk import AtTheDesk
from allo_ray.tune.measure import EVALUATE, scores_of, value_of
from allo_ray.tune.records import Scores
from allo_ray.tune.sharing import Graph, early_part

#: What a trial reports: how far it is (1: it has forgotten, 2: it is complete), what it is judged by, and the rest.
STEP, OBJECTIVE, FOUND = "step", "objective", "found"
#: Seconds between two words of a trial on what it does.
TOLD_EVERY = 2.0
#: Seconds that Tune waits for a trial that it has ended, before it gives the process to the next one. Where that is
#: not enough it drops the next one without a word, and trackers may take a while to close.
END_SECONDS = 600
#: Finished stages, stages, what it does.
Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Setting:
    """What all trials of a campaign have in common."""

    campaign: Campaign
    graph: Graph
    #: Folder that relative paths of the config start from.
    folder: str
    #: The campaign's own folder; trackers of trials write below it.
    results: str
    #: Artifacts that were computed for all trials beforehand: node -> <stage>/<key>.
    shared: Mapping[str, str]
    #: The actor that shows what trials do, and the one that has their small work done together.
    board: Any
    desk: Any


class TrialLines(Progress):
    """The progress lines of a trial as words for the campaign's own."""

    def __init__(self, stages: int, tell: Tell) -> None:
        super().__init__(Console(quiet=True), TOLD_EVERY)
        self.tell = tell
        self.begin(stages)

    def begin(self, stages: int) -> None:
        """Counts from zero, for that many stages."""
        self.stages, self.finished = stages, 0

    def say(self, text: str) -> None:
        _, _, rest = text.partition(": ")
        self.finished += rest == "in the store" or rest.startswith("done")
        self.tell(self.finished, self.stages, text)


def trial(told: dict[str, Any], setting: Setting) -> None:
    """Runs trial `told["number"]` with `told["values"]` and reports its scores, for ASHA after forgetting as well.

    A user error is reported as the trial's end. Other errors are raised, so that Tune tries again: they may come from
    a node that was lost, and what is finished costs nothing.
    """
    quiet()
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(END_SECONDS)
    if Path(setting.folder).is_dir():  # not on another machine, where a job's package lies elsewhere
        os.chdir(setting.folder)
    number, started, made = told["number"], time.perf_counter(), dict(setting.shared)
    config, board = setting.campaign.config, setting.board
    try:
        run = setting.campaign.run(told["values"])
        store, nodes = Store(run.store), setting.graph(run)
        parts = {2: nodes}
        if config.scheduler == "asha":
            parts = {1: early_part(nodes), 2: nodes}
        told_as = track.of_trial(run, config.name, number)
        folder = Path(setting.results) / "tracked" / told_as.name
        lines = TrialLines(len(nodes), lambda *words: board.tell.remote(number, *words))
        with track.opened(told_as, folder, lines.say) as trackers:
            for step, part in parts.items():
                lines.begin(len(part))
                done = pipeline.run(
                    run, part, store, lines, 1, trackers.steps, AtTheDesk(setting.desk, number)
                )
                own = {name: item for name, item in done.items() if name not in setting.shared}
                for stage, curve in results.curves(own).items():  # what another trial has computed, too
                    trackers.steps(stage, curve.to_pylist())
                made.update(_named(done, step))
                scores = scores_of(done[EVALUATE].artifact)
                seconds = round(time.perf_counter() - started, 1)
                if step == 2:
                    trackers.results({"wall_seconds": seconds, "models": _plain(scores)})
                goals = (
                    (config.objective, config.second, *config.constraints)
                    if step == 2
                    else (config.objective,)
                )
                objective, *_ = [value_of(goal, scores) for goal in goals if goal is not None]
                # As text: Tune flattens what is nested before it reaches the searcher.
                found = json.dumps({"scores": scores, "artifacts": made})
                tune.report({STEP: step, OBJECTIVE: objective, FOUND: found, "seconds": seconds})
    except UserError as error:
        tune.report({STEP: 0, "error": str(error), "seconds": round(time.perf_counter() - started, 1)})
    except Exception:
        board.failed.remote(number, traceback.format_exc())
        raise


def _named(done: Mapping[str, Done], step: int) -> dict[str, str]:
    """Node -> <stage>/<key>; the evaluation of step 1 is another than that of step 2."""
    names = {name: f"{name} (early)" if (name, step) == (EVALUATE, 1) else name for name in done}
    return {names[name]: f"{item.artifact.stage}/{item.artifact.key}" for name, item in done.items()}


def _plain(scores: Scores) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores as summary.json of a run has them: accuracy by suite, and the mean of the divergence."""
    return {
        label: {suite: {"mean": told[KL]} if suite == KL else told for suite, told in suites.items()}
        for label, suites in scores.items()
    }
