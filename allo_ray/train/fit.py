"""One Ray Train run, whose workers train jobs one after the other: DeepSpeed inside them, rows streamed by Ray Data.

Every worker gets the whole ordered stream of rows and keeps its share of each global batch (rows.py): so global batches
depend neither on the number of workers nor on restarts. A worker that dies is replaced, and all go on from the last
checkpoint of the job that it was at.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from allo_ray import tables
from allo_ray.config.train import TrainConfig, TrainerConfig
from allo_ray.errors import UserError
from allo_ray.reach import expect
from allo_ray.spent import Spent
from allo_ray.train.job import CLAIM, FACTS, RUN, TrainJob
from allo_ray.train.stream import RowStream, read

#: Seconds between two looks at the workers; Ray's own 2 s are felt at the start and end of every short run.
_HEALTH_CHECK_SECONDS = "0.25"


def fit_all(jobs: Sequence[tuple[TrainJob, int]]) -> list[Spent]:
    """Trains each job for so many steps, all on the workers that the first one asks for, and with its `max_failures`.

    A job ends with its `result`; one that has it already is not trained again, and spends nothing on a start.

    Raises:
        UserError: a node does not see the folder of a job.
        ray.train.TrainingFailedError: workers failed more than `trainer.max_failures` times.
    """
    began = time.time()
    missing = [(job, steps) for job, steps in jobs if not (job.result / FACTS).exists()]
    if missing:
        _run(missing)
    ended = time.time()
    spent = {job.out: Spent(0.0, ended - began) for job, _ in jobs}
    turns = {job.out: json.loads((job.result / FACTS).read_text())["timeline"] for job, _ in missing}
    # Starting and stopping the workers is for all of them alike; a job's own turn lies between.
    begin = [(turn["worker_started"] - began) / len(turns) for turn in turns.values()]
    end = [(ended - turn["finished"]) / len(turns) for turn in turns.values()]
    for out, turn in turns.items():
        own = min(begin) + turn["finished"] - turn["worker_started"] + min(end)
        spent[out] = Spent(min(begin), max(0.0, ended - began - own))
    return [spent[job.out] for job, _ in jobs]


def _run(jobs: Sequence[tuple[TrainJob, int]]) -> None:
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _HEALTH_CHECK_SECONDS)
    from ray.data import ExecutionOptions
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    rows: dict[str, Any] = {
        f"{number}": read(tables.TRAIN_ROWS.files(job.rows), tables.TRAIN_ROWS.schema.names)
        for number, (job, _) in enumerate(jobs)
    }
    (first, _), *_ = jobs
    trainer = first.trainer
    gpu = trainer.num_gpus > 0
    training = TorchTrainer(
        _worker,
        train_loop_config={"jobs": [(_plain(job), steps) for job, steps in jobs]},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=trainer.workers,
            elastic_resize_monitor_interval_s=trainer.resize_seconds,
            use_gpu=gpu,
            resources_per_worker={
                "CPU": trainer.num_cpus,
                **({"GPU": trainer.num_gpus} if gpu else {}),
                **trainer.resources,
            },
            placement_strategy=trainer.placement.upper(),
        ),
        run_config=RunConfig(
            name=RUN,
            storage_path=first.out,
            failure_config=FailureConfig(max_failures=trainer.max_failures),
        ),
        datasets=rows,
        dataset_config=DataConfig(
            datasets_to_split=[], execution_options=ExecutionOptions(preserve_order=True)
        ),
    )
    try:
        training.fit()
    except TrainingFailedError as error:
        told = re.search(rf"^{UserError.__module__}\.UserError: (.*)", str(error), re.MULTILINE)
        if told is None:
            raise
        raise UserError(told[1]) from None


def _plain(job: TrainJob) -> dict[str, Any]:
    return asdict(job) | {"config": job.config.model_dump(), "trainer": job.trainer.model_dump()}


def _worker(settings: dict[str, Any]) -> None:
    """What each Ray Train worker runs. Rows are on their way before torch and the model are loaded."""
    import ray.train

    for number, (told, steps) in enumerate(settings["jobs"]):
        expect(f"{told['out']}/{CLAIM}")
        job = TrainJob(
            **told | {"config": TrainConfig(**told["config"]), "trainer": TrainerConfig(**told["trainer"])}
        )
        # Workers need not see alike whether an earlier group has finished it: each reads on its own.
        begin = not (job.result / FACTS).exists()
        rows = RowStream(ray.train.get_dataset_shard(f"{number}"), begin)
        from allo_ray.train.worker import run_worker

        try:
            run_worker(job, steps, rows)
        finally:
            rows.close()
