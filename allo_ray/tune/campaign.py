"""A campaign from config to report: checks, the stages that all trials share, the search, and what it found."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from allo_ray import align, estimate, method, pipeline, results, track
from allo_ray.capacity import needs, room
from allo_ray.config.load import dump
from allo_ray.config.space import Value
from allo_ray.config.track import TrackConfig
from allo_ray.config.tune import Campaign
from allo_ray.errors import UserError
from allo_ray.models import neurons_of
from allo_ray.nodes import cluster_nodes
from allo_ray.reach import check_folder, check_store
from allo_ray.report.campaign_figures import worded
from allo_ray.report.terminal import Progress
from allo_ray.report.wording import NONE, duration
from allo_ray.session import chatter_to, cluster
from allo_ray.store import Store
from allo_ray.tune import outcome
from allo_ray.tune.concurrency import TRIAL, concurrency
from allo_ray.tune.measure import EVALUATE, check_measures, scores_of
from allo_ray.tune.outcome import Outcome
from allo_ray.tune.records import Records, Scores, claim, folder_of
from allo_ray.tune.sharing import Graph, corners, early_part, shared_keys, shared_part

#: How often a trial is tried again whose process or node was lost.
ATTEMPTS = 3
#: Trials of the closing table.
SHOWN = 10
#: Ctrl-C ends the search at once (nothing is lost), trials start where the driver is, and nothing is logged twice.
#: Beside these: all trials that the searcher hands out start at once, for it knows how many fit.
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
}


def tune(campaign: Campaign) -> Outcome:
    """Runs the trials that are missing and writes runs/<campaign>/.

    Raises:
        UserError: config, data or cluster do not allow it, said before any trial starts; or no trial finished.
    """
    console = Console()
    store = Store(campaign.base.store)
    keys = check(campaign, store)
    align.check(campaign.base, store)
    folder = claim(campaign)
    records = Records(folder)
    log = folder / "campaign.log"
    console.print(f"What Ray, vLLM and DeepSpeed say goes to {log}", highlight=False, soft_wrap=True)
    gpus = max(campaign.base.trainer.num_gpus, campaign.base.engine.pool.num_gpus)
    with chatter_to(log) as terminal, cluster(campaign.base.cluster, gpus), Progress(terminal) as lines:
        found = search(campaign, records, store, keys, lines)
    show(found, console)
    if found.data.best is None and not any(record.scores for record in records):
        errors = [record.error.strip().splitlines()[-1] for record in records if record.error]
        raise UserError(
            f"no trial finished; the first failure: {errors[0] if errors else 'unknown'}. See {log}."
        )
    return found


def check(campaign: Campaign, store: Store, graph: Graph = method.graph) -> set[str]:
    """Everything that can be found wrong before anything starts; returns the keys of the stages that all trials share.

    Raises:
        UserError: the space leaves the bounds of a field or changes nothing; a suite or model is unknown; ASHA has
            nothing to compare.
    """
    keys = shared_keys(campaign, graph, store)
    nodes = graph(campaign.base)
    check_measures(campaign, nodes)
    if campaign.config.scheduler == "asha":
        early = pipeline.plan(early_part(graph(campaign.run(_first(campaign)))), store)
        if all(item.key in keys for item in early if item.node.name == "forget"):
            raise UserError(
                "scheduler: asha compares forgotten models, and no field of the space changes forgetting: all trials "
                "share one. Set scheduler: none, or search k1 or u too."
            )
    return keys


def search(
    campaign: Campaign,
    records: Records,
    store: Store,
    keys: set[str],
    lines: Progress,
    graph: Graph = method.graph,
) -> Outcome:
    """Runs the trials that are missing on the running cluster; writes what is known also when it is interrupted."""
    from allo_ray.tune.beside import ended
    from allo_ray.tune.desk import open_desk
    from allo_ray.tune.searcher import CampaignSearcher, scheduler_of
    from allo_ray.tune.trial import Setting
    from allo_ray.tune.watch import Watch, put_up

    config = campaign.config
    # Trials may run in another folder and on other nodes: the store's path is the same everywhere.
    placed = Campaign(config, campaign.base.model_copy(update={"store": store.root}))
    local = placed.base.cluster.address is None and "RAY_ADDRESS" not in os.environ
    nodes = cluster_nodes(placed.base.cluster)
    at_once = concurrency(placed.base, config.concurrent, nodes, local)

    def room_now() -> int:
        """Trials at a time: nodes come and go."""
        if local:
            return at_once
        try:
            return concurrency(placed.base, config.concurrent, cluster_nodes(placed.base.cluster), local)
        except UserError:  # too many nodes were lost: one trial waits for others like them
            return 1

    check_store(store)
    if placed.base.track != TrackConfig():
        check_folder(
            str(records.folder),
            "Trackers of trials write there: set `runs` to a folder that all nodes mount.",
        )
    run = placed.run(_first(campaign))
    part = shared_part(graph(run), store, keys)
    parallel = min(run.cluster.parallel_stages, room(needs(run), nodes))
    with track.opened(
        placed.base.model_copy(update={"name": config.name}), records.folder, lines.say
    ) as trackers:
        made = pipeline.run(run, part, store, lines, parallel, trackers.steps)
        for stage, curve in results.curves(made).items():  # of stages that were in the store, too
            trackers.steps(stage, curve.to_pylist())
    shared = {name: f"{item.artifact.stage}/{item.artifact.key}" for name, item in made.items()}
    start: Scores = {}
    evaluated = made[EVALUATE].artifact if EVALUATE in made else None
    if evaluated is not None:
        start = scores_of(evaluated)
        shared[f"{EVALUATE} (shared)"] = shared.pop(EVALUATE)
    missing = config.total - len(records.ended)
    try:
        if missing > 0:
            lines.say(f"{missing} trials to go, {min(at_once, missing)} at a time")
            board = put_up()
            results_folder = str(records.folder.absolute())
            desk = open_desk(min(at_once, missing), {name: item.artifact for name, item in made.items()})
            setting = Setting(placed, graph, os.getcwd(), results_folder, shared, board, desk)
            with ended(board, desk), Watch(board, lines, config.total, len(records.ended)) as watch:
                scheduler = scheduler_of(campaign, records)
                _fit(setting, CampaignSearcher(campaign, records, watch, desk, room_now), scheduler, missing)
    finally:
        found = outcome.write(campaign, records, store, start)
    return found


def _fit(setting: Any, searcher: Any, scheduler: Any, trials: int) -> None:
    """Ray Tune's part. What it writes is thrown away: the records are what a campaign resumes from."""
    os.environ.update(TUNE_ENVIRONMENT, TUNE_MAX_PENDING_TRIALS_PG=str(trials))
    import ray.tune

    from allo_ray.tune.trial import trial

    with tempfile.TemporaryDirectory(prefix="allo-tune-", ignore_cleanup_errors=True) as scratch:
        ray.tune.Tuner(
            ray.tune.with_resources(
                ray.tune.with_parameters(trial, setting=setting),
                ray.tune.PlacementGroupFactory([dict(TRIAL)]),
            ),
            tune_config=ray.tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=trials,
                reuse_actors=True,  # a process has imported torch and Ray already when its next trial begins
            ),
            run_config=ray.tune.RunConfig(
                name="trials",
                storage_path=scratch,
                verbose=0,
                failure_config=ray.tune.FailureConfig(max_failures=ATTEMPTS),
            ),
        ).fit()


def show(found: Outcome, console: Console) -> None:
    """Prints the best trials and where things lie."""
    data = found.data
    metrics = [data.objective, *([data.against] if data.against else [])]
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 3, 0, 0))
    for name in (
        "trial",
        *(metric.name for metric in metrics),
        *(item.name for item in data.parameters),
        "state",
    ):
        table.add_column(Text(name), justify="left" if name == "state" else "right")
    sign = -1 if data.objective.maximise else 1
    order = sorted(
        data.measured(data.objective), key=lambda one: (one.broke, sign * one.metrics[data.objective.name])
    )
    for one in order[:SHOWN]:
        cells = [
            worded(one.metrics[metric.name], metric) if metric.name in one.metrics else NONE
            for metric in metrics
        ]
        values = [worded(one.values[item.name]) for item in data.parameters]
        state = "broke a constraint" if one.broke else one.state
        table.add_row(
            f"{one.number}", *cells, *values, state, style="bold" if one.number == data.best else ""
        )
    console.print()
    console.print(table)
    if data.start is not None:
        console.print(Text(f"start model: {data.objective.name} {worded(data.start, data.objective)}"))
    told = found.summary["stage_seconds"]
    console.print(
        Text(
            f"stages took {duration(told['spent'])}; as many independent runs: {duration(told['as_independent_runs'])}"
        )
    )
    console.print()
    for name, path in found.summary["paths"].items():
        console.print(Text(f"{name:<7} {path}"), soft_wrap=True, highlight=False)


def explain(campaign: Campaign) -> None:
    """Prints the campaign, what its trials share and what each adds, and the estimates; starts nothing."""
    console = Console()
    store = Store(campaign.base.store)
    keys = check(campaign, store)
    align.check(campaign.base, store)
    console.print(dump(campaign.config), highlight=False, markup=False)
    folder = folder_of(campaign)
    done = len(Records(folder).ended)
    console.print(f"{campaign.config.total} trials, {done} of them ended, in {folder}\n", highlight=False)
    for item in pipeline.plan(method.graph(campaign.run(_first(campaign))), store):
        shared = item.key in keys
        state = "cached" if shared and item.artifact is not None else "once" if shared else "a trial"
        console.print(f"{state:8} {item.node.name}", highlight=False)
    needed = estimate.estimate(campaign.base, neurons_of(campaign.base.model))
    largest = max(*needed.training.values(), needed.engine) / estimate.GIB
    console.print(f"\nMemory of the largest stage of a trial: {largest:.1f} GiB", highlight=False)
    for need in needs(campaign.base, TRIAL):
        console.print(f"A trial takes {need.words} ({need.settings})", highlight=False)


def _first(campaign: Campaign) -> dict[str, Value]:
    """One point of the space."""
    return next(corners(campaign))
