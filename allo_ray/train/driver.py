"""Training as a Ray job: Ray Train workers around the loop, DeepSpeed inside them, rows streamed by Ray Data.

Every worker gets the whole ordered stream of rows and keeps its share of each global batch (rows.py): so global batches
depend neither on the number of workers nor on restarts. A worker that dies is replaced, and all go on from the last
checkpoint; a driver that dies goes on from it when the same job is run again.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from allo_ray import tables
from allo_ray.config.train import TrainConfig, TrainerConfig
from allo_ray.errors import UserError
from allo_ray.losses.registry import LOSSES
from allo_ray.train.job import (
    CLAIM,
    DELTA,
    FACTS,
    HEARTBEAT,
    METRICS,
    RESULT,
    RUN,
    STEPS,
    ProgressLine,
    TrainJob,
    TrainResult,
)

#: Seconds between two looks at the workers; Ray's own 2 s are felt at the start and end of every short stage.
_HEALTH_CHECK_SECONDS = "0.25"


def train(
    job: TrainJob,
    progress: ProgressLine | None = None,
    record: Callable[[Iterable[Mapping[str, Any]]], None] = lambda rows: None,
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
    out.mkdir(parents=True, exist_ok=True)
    if job.loss not in LOSSES:
        raise UserError(f"loss '{job.loss}' is not known. There are: {', '.join(LOSSES)}.")
    LOSSES[job.loss].check(job.loss_args)
    count = _count_rows(job.rows)
    steps = math.ceil(count / job.config.batch_size)
    _claim(job, out)
    final = out / RUN / RESULT
    if not (final / FACTS).exists():
        with _Watch(out, steps, progress, record):
            _fit(job, out, steps)
    told = json.loads((final / FACTS).read_text())
    if told.get("error"):
        shutil.rmtree(final)
        raise UserError(told["error"])
    metrics = told.pop("metrics")
    tables.METRICS.write(metrics, out / METRICS)
    record(metrics)
    if (final / DELTA).exists():  # an earlier run may have been ended right below
        os.replace(final / DELTA, out / DELTA)
    facts = {
        **told,
        "rows": count,
        # Below 0 where an earlier run had finished and was ended before it could say so.
        "startup_seconds": max(0.0, told["timeline"].get("first_batch", called) - called),
        "timeline": {event: moment - called for event, moment in told["timeline"].items()},
        "seconds": time.time() - called,
        "loss": job.loss,
        "loss_args": job.loss_args,
        "config": job.config.model_dump(),
        "trainer": job.trainer.model_dump(),
    }
    (out / FACTS).write_text(json.dumps(facts, indent=1))
    shutil.rmtree(out / RUN, ignore_errors=True)
    (out / HEARTBEAT).unlink(missing_ok=True)
    (out / STEPS).unlink(missing_ok=True)
    (out / CLAIM).unlink(missing_ok=True)
    return TrainResult(out / DELTA, out / METRICS, facts)


def _claim(job: TrainJob, out: Path) -> None:
    """Notes what is trained in `out`; checkpoints of anything else are removed. Resources may change between runs."""
    told = asdict(job) | {"config": job.config.model_dump(mode="json"), "trainer": None, "out": None}
    content = json.dumps(told, sort_keys=True)
    claim = out / CLAIM
    if not claim.exists() or claim.read_text() != content:
        shutil.rmtree(out / RUN, ignore_errors=True)
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


def _fit(job: TrainJob, out: Path, steps: int) -> None:
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _HEALTH_CHECK_SECONDS)
    import ray.data
    from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    options = ray.data.ExecutionOptions(preserve_order=True)
    rows = ray.data.read_parquet(job.rows, columns=tables.TRAIN_ROWS.schema.names)
    rows.context.enable_progress_bars = False
    gpu = job.trainer.num_gpus > 0
    settings = asdict(job) | {"config": job.config.model_dump(), "trainer": job.trainer.model_dump()}
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": settings, "steps": steps, "out": str(out)},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.trainer.workers,
            elastic_resize_monitor_interval_s=job.trainer.resize_seconds,
            use_gpu=gpu,
            resources_per_worker={
                "CPU": job.trainer.num_cpus,
                **({"GPU": job.trainer.num_gpus} if gpu else {}),
                **job.trainer.resources,
            },
            placement_strategy=job.trainer.placement.upper(),
        ),
        run_config=RunConfig(
            name=RUN,
            storage_path=str(out),
            failure_config=FailureConfig(max_failures=job.trainer.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
        datasets={"rows": rows},
        dataset_config=DataConfig(datasets_to_split=[], execution_options=options),
    )
    trainer.fit()


def _worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs. Rows are on their way before torch and the model are loaded."""
    import ray.train

    from allo_ray.train.stream import RowStream

    rows = RowStream(ray.train.get_dataset_shard("rows"))
    described = settings["job"]
    job = TrainJob(
        **described
        | {"config": TrainConfig(**described["config"]), "trainer": TrainerConfig(**described["trainer"])}
    )
    from allo_ray.train.worker import run_worker

    run_worker(job, settings["steps"], Path(settings["out"]), rows)


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
