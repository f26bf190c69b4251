"""One run from config to results: checks, the stages that are missing, and the folder that the user gets."""

from __future__ import annotations

import time

from rich.console import Console

from allo_ray import estimate, method, pipeline, preflight, results, track
from allo_ray.capacity import needs, room
from allo_ray.config.load import dump
from allo_ray.config.run import RunConfig
from allo_ray.data.sources import check_source
from allo_ray.models import neurons_of
from allo_ray.nodes import cluster_nodes
from allo_ray.reach import check_store
from allo_ray.report.content import Comparison, ModelScores
from allo_ray.report.terminal import Progress, closing
from allo_ray.results import Run
from allo_ray.session import chatter_to, cluster
from allo_ray.stages.evaluate import judged_suites
from allo_ray.store import Store


def align(config: RunConfig) -> Run:
    """Runs what the store does not hold yet and writes runs/<name>/.

    Raises:
        UserError: config, data or machine do not allow the run; said before any worker starts.
    """
    console = Console()
    started = time.perf_counter()
    store = Store(config.store)
    nodes = method.graph(config)
    planned = pipeline.plan(nodes, store)
    run = results.finished(config, {item.node.name: item.key for item in planned})
    if run is not None and all(item.artifact is not None for item in planned):
        console.print(f"Nothing to do: {run.folder} holds this run already.")
        show(run, console)
        return run
    check(config, store)
    log = results.claim(config) / "run.log"
    console.print(f"What Ray, vLLM and DeepSpeed say goes to {log}", highlight=False, soft_wrap=True)
    gpus = max(config.trainer.num_gpus, config.engine.pool.num_gpus)
    with (
        chatter_to(log) as terminal,
        track.opened(config, log.parent, terminal.print) as trackers,
        cluster(config.cluster, gpus),
    ):
        parallel = min(config.cluster.parallel_stages, room(needs(config), cluster_nodes(config.cluster)))
        check_store(store)
        with Progress(terminal) as lines:
            done = pipeline.run(config, nodes, store, lines, parallel, trackers.steps)
        for stage, table in results.curves(done).items():  # of stages that were in the store, too
            trackers.steps(stage, table.to_pylist())
        run = results.write(config, done, store, time.perf_counter() - started)
        trackers.results(run.summary)
    show(run, console)
    return run


def show(run: Run, console: Console) -> None:
    """Prints the closing table of a finished run."""
    scores = [
        ModelScores(label, suite, told["correct"], told["n"], told["low"], told["high"])
        for label, suites in run.summary["models"].items()
        for suite, told in suites.items()
        if suite != results.KL
    ]
    closing(
        console, scores, [Comparison(**told) for told in run.summary["comparisons"]], run.summary["paths"]
    )


def check(config: RunConfig, store: Store) -> None:
    """Everything that can be found wrong without a worker: trackers, models, losses, suites, data, memory, disk."""
    track.check(config.track)
    preflight.check(config)
    judged_suites(config.evaluate.suites, config.evaluate.judge)
    check_source(config.data)
    if config.sft is not None and config.sft.data is not None:
        check_source(config.sft.data)
    neurons = neurons_of(config.model)
    estimate.check(config, estimate.estimate(config, neurons), store)
    for key, count in {"model.path": neurons, **estimate.other_models(config)}.items():
        estimate.check_engine(config.engine, count, key, config.cluster.address)


def explain(config: RunConfig) -> None:
    """Prints the resolved config, the stages with what is cached, and the estimates; starts nothing.

    Raises:
        UserError: as `check`, once all is printed.
    """
    console = Console()
    store = Store(config.store)
    console.print(dump(config), highlight=False, markup=False)
    for item in pipeline.plan(method.graph(config), store):
        reads = ", ".join(dict.fromkeys(item.node.inputs.values())) or "-"
        state = "cached" if item.artifact is not None else "to do"
        console.print(
            f"{state:7} {item.node.name:28} {item.key}  reads: {reads}", highlight=False, soft_wrap=True
        )
    needed = estimate.estimate(config, neurons_of(config.model))
    console.print("\nEstimates (arithmetic, see allo_ray/estimate.py):", highlight=False)
    for stage, size in needed.training.items():
        console.print(f"  memory of a worker, {stage:12} {size / estimate.GIB:6.1f} GiB", highlight=False)
    console.print(
        f"  memory of an engine              {needed.engine / estimate.GIB:6.1f} GiB", highlight=False
    )
    console.print(
        f"  disk, store and run              {needed.disk / estimate.GIB:6.1f} GiB", highlight=False
    )
    check(config, store)
