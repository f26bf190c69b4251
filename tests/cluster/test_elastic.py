"""Training with `trainer.workers: [1, 2]` on a cluster that has room for one worker and then gains a node."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allo_ray import tables
from allo_ray.neurons import delta
from allo_ray.train.job import STEPS
from tests.cluster.conftest import LocalCluster

ROOT = Path(__file__).resolve().parents[2]
STEPS_OF_RUN, BATCH = 150, 32
TRAIN = """
import json, sys, ray
from allo_ray.config.train import TrainConfig, TrainerConfig
from allo_ray.session import quiet
from allo_ray.train.driver import train
from allo_ray.train.job import TrainJob
quiet()
ray.init(log_to_driver=False)
model, rows, out, batch, workers = sys.argv[1:]
trainer = TrainerConfig(
    workers=json.loads(workers), num_cpus=2, threads=1, micro_batch_tokens=64, checkpoint_every=4, resize_seconds=2
)
config = TrainConfig(lr=1e-3, batch_size=int(batch), dtype="float32")
train(TrainJob(model, (), None, rows, "sft", config, trainer, out))
"""


def write_rows(path: Path) -> None:
    rng = np.random.default_rng(0)
    none: list[Any] = []
    rows = [
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
        for at in range(STEPS_OF_RUN * BATCH)
    ]
    tables.TRAIN_ROWS.write(rows, path)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_worker_joins_with_its_node_and_changes_nothing_but_the_order_of_sums(
    local_cluster: LocalCluster, tiny_llama: Path, tmp_path: Path
) -> None:
    """The same batches and steps as on one worker all the way; weights within float32 rounding of as many steps."""
    write_rows(tmp_path / "rows.parquet")

    def start(out: str, workers: Any) -> subprocess.Popen[str]:
        arguments = [
            str(tiny_llama),
            str(tmp_path / "rows.parquet"),
            str(tmp_path / out),
            str(BATCH),
            json.dumps(workers),
        ]
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", TRAIN, *arguments],
            cwd=ROOT,
            env={**local_cluster.environment, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    # Room for one worker of two CPUs on node1, and a CPU for the tasks that read rows.
    local_cluster.run("add", "reader", "--num-cpus", "1")
    try:
        run = start("elastic", [1, 2])
        patience = time.monotonic() + 300
        while not (tmp_path / "elastic" / STEPS).exists():
            assert run.poll() is None, run.stdout and run.stdout.read()
            assert time.monotonic() < patience
            time.sleep(0.2)
        local_cluster.run("add", "late", "--num-cpus", "3")
        told, _ = run.communicate(timeout=600)
        assert run.returncode == 0, told
        local_cluster.run("kill", "late")
        alone = start("alone", 1)
        told, _ = alone.communicate(timeout=600)
        assert alone.returncode == 0, told
    finally:
        local_cluster.run("kill", "reader")

    facts = {name: json.loads((tmp_path / name / "train.json").read_text()) for name in ("elastic", "alone")}
    assert facts["elastic"]["workers"] == 2, "the run ended before the node's room was used"
    assert facts["elastic"]["resumed_at"] >= 4
    assert facts["alone"]["workers"] == 1
    metrics = {name: tables.METRICS.read(tmp_path / name / "metrics.parquet") for name in facts}
    for told in metrics.values():
        assert told["step"].to_pylist() == list(range(STEPS_OF_RUN))
    assert metrics["elastic"]["tokens"] == metrics["alone"]["tokens"]
    np.testing.assert_allclose(metrics["elastic"]["loss"], metrics["alone"]["loss"], rtol=1e-4)
    one, two = (delta.load(tmp_path / name / "delta.safetensors") for name in ("alone", "elastic"))
    assert max(float((one.values(name) - two.values(name)).abs().max()) for name in one.names) < 1e-3
