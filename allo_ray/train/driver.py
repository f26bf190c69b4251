"""A training job from its claim on a folder to the results there; the workers are fit.py's.

A driver that dies goes on from the job's last checkpoint when the same job is run again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from allo_ray import tables
from allo_ray.errors import UserError
from allo_ray.losses.registry import LOSSES
from allo_ray.spent import Spent
from allo_ray.train.fit import fit_all
from allo_ray.train.job import (
    CLAIM,
    DELTA,
    FACTS,
    HEARTBEAT,
    METRICS,
    STEPS,
    ProgressLine,
    TrainJob,
    TrainResult,
)

#: Trains a job for so many steps (fit.py), until its result is there.
Fit = Callable[[TrainJob, int], Spent]


def alone(job: TrainJob, steps: int) -> Spent:
    """On workers of its own."""
    return fit_all([(job, steps)])[0]


def train(
    job: TrainJob,
    progress: ProgressLine | None = None,
    record: Callable[[Iterable[Mapping[str, Any]]], None] = lambda rows: None,
    fit: Fit = alone,
) -> TrainResult:
    """Trains one stage on the running Ray cluster.

    `record` gets rows of METRICS while the job runs and all of them at its end: every step, some of them twice.

    Writes `out/delta.safetensors` (fp32 masters of the trained neurons), `out/metrics.parquet` (METRICS) and
    `out/train.json`. If `out` holds checkpoints of an interrupted run of the same job, it goes on from the last one.

    Raises:
        UserError: rows are missing or of another table; the selection or a layer does not belong to the model; a loss
            or a gradient is not finite.
        ray.train.TrainingFailedError: workers failed more than `trainer.max_failures` times.
    """
    called = time.time()
    out = Path(job.out).absolute()
    job = replace(job, out=str(out))
    out.mkdir(parents=True, exist_ok=True)
    if job.loss not in LOSSES:
        raise UserError(f"loss '{job.loss}' is not known. There are: {', '.join(LOSSES)}.")
    LOSSES[job.loss].check(job.loss_args)
    count = _count_rows(job.rows)
    steps = math.ceil(count / job.config.batch_size)
    _claim(job, out)
    with _Watch(out, steps, progress, record):
        spent = fit(job, steps)
    told = json.loads((job.result / FACTS).read_text())
    if told.get("error"):
        shutil.rmtree(job.result)
        raise UserError(told["error"])
    metrics, timeline = told.pop("metrics"), told.pop("timeline")
    tables.METRICS.write(metrics, out / METRICS)
    record(metrics)
    if (job.result / DELTA).exists():  # an earlier run may have been ended right below
        os.replace(job.result / DELTA, out / DELTA)
    begun = timeline["worker_started"] - spent.startup
    timeline = {event: moment - begun for event, moment in timeline.items()}
    if not spent.startup:  # an earlier run had finished and was ended before it could say so
        timeline = dict.fromkeys(timeline, 0.0)
    facts = {
        **told,
        "rows": count,
        "startup_seconds": timeline.get("first_batch", timeline["worker_started"]),
        "timeline": timeline,
        "seconds": time.time() - called - spent.waited,
        "loss": job.loss,
        "loss_args": job.loss_args,
        "config": job.config.model_dump(),
        "trainer": job.trainer.model_dump(),
    }
    (out / FACTS).write_text(json.dumps(facts, indent=1))
    shutil.rmtree(job.run, ignore_errors=True)
    (out / HEARTBEAT).unlink(missing_ok=True)
    (out / STEPS).unlink(missing_ok=True)
    (out / CLAIM).unlink(missing_ok=True)
    return TrainResult(out / DELTA, out / METRICS, facts, Spent(facts["startup_seconds"], spent.waited))


def _claim(job: TrainJob, out: Path) -> None:
    """Notes what is trained in `out`; checkpoints of anything else are removed. Resources may change between runs."""
    told = asdict(job) | {"config": job.config.model_dump(mode="json"), "trainer": None, "out": None}
    content = json.dumps(told, sort_keys=True)
    claim = out / CLAIM
    if not claim.exists() or claim.read_text() != content:
        shutil.rmtree(job.run, ignore_errors=True)
        claim.write_text(content)


def _count_rows(path: str) -> int:
    files = tables.TRAIN_ROWS.files(path)
    if not files:
        raise UserError(f"{path}: no training rows there.")
    for file in files:
        tables.TRAIN_ROWS.check(pq.read_schema(file), file)
    count = sum(pq.read_metadata(file).num_rows for file in files)
    if count == 0:
        raise UserError(
            f"{path}: the table of training rows is empty. See the list of dropped rows for the reason."
        )
    return count


class _Watch:
    """Passes what rank 0 writes about the run on to the progress line and to `record`, until the block ends."""

    def __init__(
        self,
        out: Path,
        steps: int,
        progress: ProgressLine | None,
        record: Callable[[Iterable[Mapping[str, Any]]], None],
    ) -> None:
        self.out, self.steps, self.progress, self.record = out, steps, progress, record
        self._read: tuple[int, int] = (0, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            try:
                told = json.loads((self.out / HEARTBEAT).read_text())
                rows = self._fresh_rows()
            except (OSError, ValueError):  # not there yet, or just being replaced
                continue
            if self.progress is not None:
                self.progress.update(
                    told["done"],
                    self.steps,
                    "step",
                    loss=told["loss"],
                    tokens_per_second=told["tokens_per_second"],
                )
            self.record(rows)

    def _fresh_rows(self) -> list[dict[str, Any]]:
        """Rows of METRICS since the last call; workers that had to start again begin a new file."""
        with (self.out / STEPS).open("rb") as file:
            number = os.fstat(file.fileno()).st_ino
            begin = self._read[1] if number == self._read[0] else 0
            file.seek(begin)
            whole = file.read().rpartition(b"\n")[0]  # the last line may be half written
        if not whole:
            return []
        self._read = (0, 0)  # where a line does not parse, the next call begins again
        rows = [json.loads(line) for line in whole.splitlines()]
        self._read = (number, begin + len(whole) + 1)
        return rows
