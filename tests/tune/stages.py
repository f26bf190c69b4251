"""A run with real stages that take no time: a number flows through them, and decides how many answers are right.

    model - sft - forget (k1, u) - learn (k2, v) - evaluate (SFT, forgotten, ALLO)

Every execution that ends leaves a line in journal.txt beside the store: stage, key, process, beginning and end; each
forgetting that begins leaves one in begun.txt. Where there is a file closed.txt, trackers take three seconds to close
and leave whether the trial failed in it. As a script it is the driver of a campaign on a running cluster, which
tests kill:

    python -m tests.tune.stages CAMPAIGN ADDRESS
"""

from __future__ import annotations

import io
import os
import sys
import time
from pathlib import Path

from rich.console import Console

from allo_ray import tables, track
from allo_ray.config.run import RunConfig
from allo_ray.config.tune import Campaign, load_campaign
from allo_ray.errors import UserError
from allo_ray.pipeline import Node
from allo_ray.report.terminal import Progress
from allo_ray.stages.base import Context, Stage
from allo_ray.stages.evaluate import MODEL_ROLE
from allo_ray.store import Store
from allo_ray.tune.campaign import check, search
from allo_ray.tune.outcome import Outcome
from allo_ray.tune.records import Records, claim
from jobs.cli import guarded

QUESTIONS = 200


def graph(config: RunConfig) -> list[Node]:
    """Stages of a run. Forgetting takes `forget.weight_decay` seconds; learning `learn.weight_decay`, and the CPUs of
    the trainer."""
    forget, learn = config.forget, config.learn
    assert forget is not None
    assert learn is not None
    models = {"SFT": "sft", "forgotten": "forget", "ALLO": "learn"}
    return [
        Node("sft", SFT, {"seed": config.seed}, {}),
        Node("forget", FORGET, {"k": forget.k, "u": forget.u}, {"start": "sft"}),
        Node("learn", LEARN, {"k": learn.k, "v": learn.v}, {"start": "forget"}),
        Node("evaluate", EVALUATE, {}, {f"{MODEL_ROLE}{label}": name for label, name in models.items()}),
    ]


def _journal(ctx: Context, stage: str, begun: float) -> None:
    line = f"{stage} {ctx.key} {os.getpid()} {begun} {time.time()}\n"
    with (Path(ctx.store.root).parent / "journal.txt").open("a") as file:
        file.write(line)


def _curve(ctx: Context) -> None:
    """A step as trained stages leave it."""
    row = dict.fromkeys(tables.METRICS.schema.names) | {"step": 0, "loss": ctx.settings.get("u", 0.5)}
    tables.METRICS.write([row], ctx.out / "metrics.parquet")


def journal(store: Path) -> list[tuple[str, str, int, float, float]]:
    """(stage, key, process, beginning, end) of each execution."""
    lines = (store.parent / "journal.txt").read_text().splitlines()
    told = [line.split() for line in lines]
    return [(stage, key, int(pid), float(start), float(end)) for stage, key, pid, start, end in told]


def forgettings(store: Path) -> list[tuple[str, int, float]]:
    """(key, process, beginning) of each forgetting that has begun."""
    file = store.parent / "begun.txt"
    told = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return [(key, int(pid), float(start)) for key, pid, start in told]


def _sft(ctx: Context) -> None:
    begun = time.time()
    (ctx.out / "number").write_text("0.5")
    _curve(ctx)
    _journal(ctx, "sft", begun)


def _close_slowly(notes: Path) -> None:
    """In this process, for the trials that it serves from now on."""
    close = track.Trackers.close
    if close.__name__ == "slowly":
        return

    def slowly(trackers: track.Trackers, failed: bool) -> None:
        time.sleep(3)
        close(trackers, failed)
        with notes.open("a") as file:
            file.write(f"{failed}\n")

    track.Trackers.close = slowly  # type: ignore[method-assign]


def _forget(ctx: Context) -> None:
    """Best at k1 = 0.1 and u = 0.9."""
    begun = time.time()
    if (notes := Path(ctx.store.root).parent / "closed.txt").exists():
        _close_slowly(notes)
    with (Path(ctx.store.root).parent / "begun.txt").open("a") as file:
        file.write(f"{ctx.key} {os.getpid()} {begun}\n")
    assert ctx.config.forget is not None
    time.sleep(ctx.config.forget.weight_decay)
    loss = abs(ctx.settings["k"] - 0.1) + abs(ctx.settings["u"] - 0.9)
    number = float(ctx.file("start", "number").read_text())
    (ctx.out / "number").write_text(str(number + 0.2 - loss / 2))
    _curve(ctx)
    _journal(ctx, "forget", begun)


class _Busy:
    """An actor that holds its CPUs while rows come in, which take none."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, batch: dict) -> dict:
        time.sleep(self.seconds)
        return batch


def _learn(ctx: Context) -> None:
    """Best at v = 0.2. v above 0.9 is a user's mistake, and above 0.8 an error."""
    import ray.data

    begun = time.time()
    settings, config = ctx.settings, ctx.config
    if settings["v"] > 0.9:
        raise UserError("learn.v: too much")
    if settings["v"] > 0.8:
        raise ValueError("broken on purpose")
    assert config.learn is not None
    workers = config.trainer.workers
    assert isinstance(workers, int)
    if config.learn.weight_decay:
        rows = ray.data.from_items(list(range(workers)), override_num_blocks=workers).map_batches(
            _Busy,
            fn_constructor_args=(config.learn.weight_decay,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=config.trainer.num_cpus,
        )
        assert rows.count() == workers
    number = float(ctx.file("start", "number").read_text())
    (ctx.out / "number").write_text(str(number + 0.2 - abs(settings["v"] - 0.2) / 2))
    _curve(ctx)
    _journal(ctx, "learn", begun)


def _evaluate(ctx: Context) -> None:
    begun = time.time()
    labels = [role.removeprefix(MODEL_ROLE) for role in ctx.inputs]
    numbers = {label: float(ctx.file(f"{MODEL_ROLE}{label}", "number").read_text()) for label in labels}
    for label, number in numbers.items():
        right = round(QUESTIONS * number)
        rows = [
            {"suite": "held-out", "id": str(i), "prompt": "", "response": "", "answer": "", "reference": ""}
            | {"correct": i < right}
            for i in range(QUESTIONS)
        ]
        tables.EVALS.write(rows, ctx.out / "evals" / f"{label}.parquet")
    ctx.facts["models"], ctx.facts["judged"] = labels, []
    start = numbers["SFT"]
    ctx.facts["kl"] = {
        label: {"mean": abs(number - start), "standard_error": None, "n": 1}
        for label, number in numbers.items()
    }
    _journal(ctx, "evaluate", begun)


SFT, FORGET = Stage("sft", 1, _sft), Stage("forget", 1, _forget)
LEARN, EVALUATE = Stage("learn", 1, _learn), Stage("evaluate", 1, _evaluate)


def run(campaign: Campaign) -> Outcome:
    """The campaign on the running cluster."""
    store = Store(campaign.base.store)
    keys = check(campaign, store, graph)
    lines = Progress(Console(file=io.StringIO()))
    return search(campaign, Records(claim(campaign)), store, keys, lines, graph)


def main(arguments: list[str]) -> int:
    """As a job of `allo`: see the module."""
    import ray

    ray.init(address=arguments[1], log_to_driver=False)
    run(load_campaign(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(guarded("tests.tune.stages", sys.argv[1:]))  # by its name, so that workers find the stages there
