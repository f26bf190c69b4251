"""A run whose driver is killed with SIGKILL in the middle of stages, run again each time, ends as one never killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest

from allo_ray import tables
from allo_ray.config.load import dump, load
from allo_ray.data.shards import Shards

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

#: The smoke preset in float32 without the stages that the others show as well: small batches and many shards, so that
#: every stage has a middle to be killed in.
CONFIG = """
extends: smoke
name: resume
sft: null
rewrite: null
reward: null
forget: null
engine: {kind: transformers, dtype: float32, pool: {batch_size: 2, batches_in_flight: 1, threads: 1}}
sample: {max_tokens: 24}
warmup: {dtype: float32, batch_size: 2}
learn: {dtype: float32, batch_size: 2, reference: sft}
trainer: {threads: 1, checkpoint_every: 1}
cluster: {parallel_stages: 1}
evaluate:
  kl_samples: 0
  suites:
    - {name: arithmetic, label: held-out, args: {train: 24, sft: 16, test: 300}, limit: 24}
"""
#: Where a driver is killed: as soon as the work folder of a stage holds the first of these files.
KILLS = {"sample": "samples/*.parquet", "warmup": "run/step-????????", "learn": "run/step-????????"}
MACHINE = "learn"
#: Seconds that processes of a killed driver's cluster may live on.
LINGER = 60


@dataclass(frozen=True)
class Run:
    """A finished run in a store of its own."""

    store: Path
    folder: Path
    summary: dict[str, Any]

    def artifact(self, node: str) -> Path:
        [found] = self.store.glob(f"*/{self.summary['artifacts'][node]}")
        return found

    def facts(self, node: str) -> dict[str, Any]:
        return json.loads((self.artifact(node) / "artifact.json").read_text())["facts"]


def start(config: Path, folder: Path) -> subprocess.Popen[bytes]:
    settings = [f"store={folder / 'store'}", f"runs={folder / 'runs'}"]
    words = [word for setting in settings for word in ("--set", setting)]
    with (folder / "out").open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.align", "--config", str(config), *words],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
            stdout=out,
            stderr=out,
        )


def finish(config: Path, folder: Path) -> Run:
    driver = start(config, folder)
    assert driver.wait(900) == 0, (folder / "out").read_text()[-4000:]
    run = folder / "runs" / "resume"
    return Run(folder / "store", run, json.loads((run / "summary.json").read_text()))


def kill_in(config: Path, folder: Path, stage: str, sign: str) -> None:
    """Starts a run and kills its driver in the middle of `stage`, and nothing else; in MACHINE its whole cluster, as
    where a machine goes down."""
    driver = start(config, folder)
    work = folder / "store" / ".work"
    while not any(work.glob(f"{stage}-*/{sign}")):
        assert driver.poll() is None, (folder / "out").read_text()[-4000:]
        time.sleep(0.005)
    cluster = psutil.Process(driver.pid).children(recursive=True)
    assert any("Worker" in name for name in names(cluster)), "the driver's cluster was at work"
    driver.send_signal(signal.SIGKILL)
    for process in cluster if stage == MACHINE else []:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    driver.wait()
    assert not (folder / "store" / stage).exists(), f"{stage} was over before the kill; make it longer"
    patience = time.monotonic() + LINGER
    while any("Worker" in name for name in names(cluster)):  # agents without a cluster do no harm
        assert time.monotonic() < patience, f"still there after {LINGER} s: {names(cluster)}"
        time.sleep(0.1)


def names(processes: list[psutil.Process]) -> list[str]:
    """Names of those that still run."""
    found = []
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.name())
        except psutil.NoSuchProcess:
            pass
    return found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config with every default spelled out: the same for all runs, whoever edits a preset meanwhile."""
    path = tmp_path_factory.mktemp("config") / "resume.yaml"
    path.write_text(CONFIG)
    path.write_text(dump(load(path)))
    return path


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finish(config, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def killed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Killed in sampling, in the warm-up and in learning, then left alone."""
    folder = tmp_path_factory.mktemp("killed")
    for stage, sign in KILLS.items():
        kill_in(config, folder, stage, sign)
    return finish(config, folder)


def test_the_same_artifacts(undisturbed: Run, killed: Run) -> None:
    assert killed.summary["artifacts"] == undisturbed.summary["artifacts"]
    assert killed.summary["models"] == undisturbed.summary["models"]
    assert killed.summary["counts"] == undisturbed.summary["counts"]


def test_it_went_on_inside_the_stages(killed: Run) -> None:
    """What was sampled and trained before a kill was not done again. Workers whose driver is gone may get to the end of
    a short training before their cluster is: then the next run starts none."""
    assert killed.facts("sample")["engine"]["skipped"] > 0
    assert killed.facts("warmup")["resumed_at"] >= 1 or killed.facts("warmup")["startup_seconds"] == 0
    assert killed.facts(MACHINE)["resumed_at"] >= 1
    ran = (killed.folder.parents[1] / "out").read_text()
    assert [ran.count(f"{stage}: started") for stage in ("pairs", "reference", *KILLS)] == [1, 1, 2, 2, 2]


def test_samples_and_pairs_are_equal(undisturbed: Run, killed: Run) -> None:
    def samples(run: Run) -> pa.Table:
        return Shards(str(run.artifact("sample") / "samples"), tables.SAMPLES, "prompt_id").read()

    assert samples(killed).equals(samples(undisturbed))
    for node, file, table in (
        ("pairs", "pairs.parquet", tables.PAIRS),
        ("learn", "rows.parquet", tables.TRAIN_ROWS),
    ):
        one, other = (table.read(run.artifact(node) / file) for run in (undisturbed, killed))
        assert one.equals(other)


@pytest.mark.parametrize("stage", ["warmup", "learn"])
def test_the_trained_values_are_bit_identical(undisturbed: Run, killed: Run, stage: str) -> None:
    one, other = (run.artifact(stage) / "delta.safetensors" for run in (undisturbed, killed))
    assert one.read_bytes() == other.read_bytes()
    losses = [
        tables.METRICS.read(run.artifact(stage) / "metrics.parquet").drop_columns(
            ["seconds", "tokens_per_second", "peak_rss"]
        )
        for run in (undisturbed, killed)
    ]
    assert losses[0].equals(losses[1])


def test_the_result_is_bit_identical(undisturbed: Run, killed: Run) -> None:
    for name in ("delta.safetensors", "aligned/model.safetensors"):
        assert (undisturbed.folder / name).read_bytes() == (killed.folder / name).read_bytes()
    for table in (undisturbed.artifact("evaluate") / "evals").iterdir():
        other = killed.artifact("evaluate") / "evals" / table.name
        assert tables.EVALS.read(table).equals(tables.EVALS.read(other))
