"""Training on a real cluster whose batches wait for a group of workers of a given size, whatever the clock says."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import cloudpickle

from allo_ray import tables
from allo_ray.config.train import TrainConfig, TrainerConfig
from allo_ray.neurons import delta
from allo_ray.train.checkpoint import Progress
from allo_ray.train.job import FACTS, METRICS, TrainJob
from allo_ray.train.loop import Plan, run
from allo_ray.train.rows import global_batches
from allo_ray.train.updater import PlainUpdater
from allo_ray.train.worker import build

cloudpickle.register_pickle_by_value(sys.modules[__name__])

#: Batches for each group, with a checkpoint after the last of them; rows of a batch.
EVERY, BATCH = 3, 16
CONFIG = TrainConfig(lr=1e-4, batch_size=BATCH, dtype="float32")


def write_rows(path: Path, groups: int) -> None:
    """Enough random rows for `groups` groups."""
    rng = np.random.default_rng(0)
    none: list[Any] = []
    tables.TRAIN_ROWS.write(
        [
            {
                "position": at,
                "id": f"row{at}",
                "prompt_ids": rng.integers(3, 300, rng.integers(3, 20)).tolist(),
                "chosen_ids": rng.integers(3, 300, rng.integers(1, 20)).tolist(),
                "rejected_ids": none,
                "chosen_reference": none,
                "rejected_reference": none,
                "rejected_weight": none,
            }
            for at in range(groups * EVERY * BATCH)
        ],
        path,
    )


def job(model: Path, folder: Path, workers: int | tuple[int, int]) -> TrainJob:
    """Supervised training of all neurons of `model` on workers that take two CPUs each."""
    trainer = TrainerConfig(
        workers=workers,
        num_cpus=2,
        threads=1,
        micro_batch_tokens=256,
        checkpoint_every=EVERY,
        resize_seconds=1,
    )
    rows, out = str(folder / "rows.parquet"), str(folder / "out")
    return TrainJob(str(model), (), None, rows, "sft", CONFIG, trainer, out)


def train(model: str, folder: str, workers: str, *groups: str) -> None:
    """The driver: batch b is trained by a group of groups[b // EVERY] workers and by no other."""
    import ray

    from allo_ray.session import quiet
    from allo_ray.train import driver, fit

    quiet()
    # A lost node counts as room for up to 20 s; workers that are asked for in this time wait in vain.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "5"
    ray.init(log_to_driver=False)
    sizes = [int(group) for group in groups]
    fit._worker = lambda settings: _held(settings, sizes)
    fewest, most = json.loads(workers)
    driver.train(job(Path(model), Path(folder), fewest if fewest == most else (fewest, most)))


def _held(settings: dict[str, Any], sizes: list[int]) -> None:
    """The driver's worker, whose batches wait until they are the group's, and are noted in <job's folder>/seen."""
    import ray.train

    from allo_ray.train import fit, worker

    context = ray.train.get_context()
    size, rank = context.get_world_size(), context.get_world_rank()
    [(told, _)] = settings["jobs"]
    seen = Path(told["out"]).with_name("seen") / f"{os.getpid()}.jsonl"
    seen.parent.mkdir(exist_ok=True)

    def batches(rows: Any, batch_size: int, first: int) -> Iterator[list[Any]]:
        for step, batch in enumerate(global_batches(rows, batch_size, first), first):
            while sizes[step // EVERY] != size:  # until this group is replaced
                time.sleep(0.1)
            node = ray.get_runtime_context().get_node_id()
            told = {"step": step, "size": size, "rank": rank, "node": node}
            with seen.open("a") as file:
                file.write(json.dumps(told | {"rows": [row.position for row in batch]}) + "\n")
            yield batch

    worker.global_batches = batches
    fit._worker(settings)


def check(model: Path, folder: Path, sizes: list[int]) -> dict[str, Any]:
    """Fails unless every batch was trained by all workers of its group, each on a node of its own, and the result is
    that of one worker in one go (the plain loop, whose bits one Ray Train worker keeps: tests/train/test_driver.py)
    but for the order of float sums. Returns the job's facts."""
    seen = [
        json.loads(line) for file in (folder / "seen").iterdir() for line in file.read_text().splitlines()
    ]
    nodes: dict[tuple[int, int], set[str]] = {}
    for told in seen:
        step = told["step"]
        assert told["rows"] == list(range(step * BATCH, (step + 1) * BATCH))
        nodes.setdefault((step, told["size"]), set()).add(told["node"])
    steps = len(sizes) * EVERY
    assert {place: len(found) for place, found in nodes.items()} == {
        (step, sizes[step // EVERY]): sizes[step // EVERY] for step in range(steps)
    }
    given = job(model, folder, 1)
    policy, neurons = build(given, torch.device("cpu"))
    updater = PlainUpdater(policy, neurons, CONFIG)
    before = {name: values.detach().clone() for name, values in neurons.named_values()}
    plan = Plan(given.loss, {}, CONFIG, steps, given.trainer.micro_batch_tokens)
    batches = global_batches([tables.TRAIN_ROWS.read(given.rows)], BATCH)
    alone = run(updater, plan, batches, Progress())
    metrics = tables.METRICS.read(folder / "out" / METRICS)
    assert metrics["step"].to_pylist() == list(range(steps))
    assert metrics["tokens"].to_pylist() == [row["tokens"] for row in alone.metrics]
    found = delta.load(folder / "out" / "delta.safetensors")
    for name, values in neurons.named_values():
        assert float((found.values(name) - values.detach()).abs().max()) < 1e-5
        assert float((before[name] - values.detach()).abs().max()) > 1e-4, "far more than that was learnt"
    return json.loads((folder / "out" / FACTS).read_text())
