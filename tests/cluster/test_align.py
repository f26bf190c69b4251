"""The whole method on a tiny random model, through the same real parts as a big run, by a real `ray job submit`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from allo_ray import tables
from allo_ray.neurons.delta import load
from tests.cluster.conftest import LocalCluster

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@dataclass(frozen=True)
class Smoke:
    """A finished smoke run: its folders and summary.json."""

    store: Path
    runs: Path
    summary: dict[str, Any]
    log: str

    @property
    def folder(self) -> Path:
        return self.runs / "smoke"

    def artifact(self, stage: str) -> Path:
        [found] = (self.store / stage).iterdir()
        return found


def _align(store: Path, runs: Path) -> list[str]:
    settings = [f"store={store}", f"runs={runs}"]
    return ["align", "--config", "smoke", *(word for setting in settings for word in ("--set", setting))]


@pytest.fixture(scope="module")
def smoke(local_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Smoke]:
    """One run on a cluster of its own nodes, submitted as a user would."""
    folder = tmp_path_factory.mktemp("smoke")
    store, runs = folder / "store", folder / "runs"
    local_cluster.run("add", "workers", "--num-cpus", "6")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "jobs.cli", "submit", "--", *_align(store, runs)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**local_cluster.environment, "RAY_API_SERVER_ADDRESS": local_cluster.dashboard},
        timeout=1400,
    )
    local_cluster.run("kill", "workers")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    summary = json.loads((runs / "smoke" / "summary.json").read_text())
    return Smoke(store, runs, summary, done.stdout)


def test_the_run_leaves_what_it_promises(smoke: Smoke) -> None:
    for name in (
        "summary.json",
        "report.html",
        "config.resolved.yaml",
        "delta.safetensors",
        "aligned/config.json",
    ):
        assert (smoke.folder / name).is_file(), name
    assert set(smoke.summary["models"]) == {"SFT", "DPO", "forgotten", "ALLO"}
    assert {stage["name"] for stage in smoke.summary["stages"]} >= {"sample", "warmup", "forget", "learn"}
    assert "ALLO against SFT" in smoke.log
    report = (smoke.folder / "report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "")


@pytest.mark.parametrize("stage", ["warmup", "learn"])
def test_the_first_dpo_loss_is_ln_2(smoke: Smoke, stage: str) -> None:
    """Policy and reference are one model at the first step: every log-ratio is 0, and -log sigmoid(0) = ln 2.

    bf16: another packing of the reference pass moves log-ratios by about 1e-2, the loss by under 1e-3.
    """
    metrics = tables.METRICS.read(smoke.artifact(stage) / "metrics.parquet")
    assert metrics["loss"][0].as_py() == pytest.approx(0.6931, abs=1e-3)


def test_exactly_round_k_n_neurons_are_selected_and_no_other_one_moves(smoke: Smoke) -> None:
    """k1 = 5 % and k2 = 10 % of N: the delta holds their union, and everything else keeps the backbone's bits."""
    neurons = smoke.summary["neurons"]
    for name, k in (("locate 5 %", 0.05), ("locate 10 %", 0.10)):
        assert neurons[name]["selected"] == round(k * neurons[name]["of"])
    delta = load(smoke.folder / "delta.safetensors")
    assert round(0.10 * delta.total) == delta.count, "the top 5 % lie within the top 10 %"
    before = load_file(smoke.artifact("sft") / "model" / "model.safetensors")
    after = load_file(smoke.folder / "aligned" / "model.safetensors")
    moved = 0
    for name, weight in before.items():
        changed = (weight != after[name]).flatten()
        indices = delta.indices(name) if delta.count_of(name) else torch.zeros(0, dtype=torch.int64)
        assert indices is not None
        changed_outside = changed.clone()
        changed_outside[indices.long()] = False
        assert not changed_outside.any(), name
        moved += int(changed.sum())
    assert moved > 0


def test_the_delta_rebuilds_the_model_bit_for_bit(smoke: Smoke, tmp_path: Path) -> None:
    out = tmp_path / "rebuilt"
    words = [
        "export",
        "--base",
        smoke.summary["paths"]["base"],
        "--delta",
        str(smoke.folder / "delta.safetensors"),
    ]
    subprocess.run(
        [sys.executable, "-m", "jobs.cli", *words, "--out", str(out)], cwd=ROOT, check=True, timeout=300
    )
    rebuilt, aligned = (load_file(path / "model.safetensors") for path in (out, smoke.folder / "aligned"))
    assert rebuilt.keys() == aligned.keys()
    assert all(torch.equal(rebuilt[name], aligned[name]) for name in rebuilt)


def test_the_aligned_model_loads_with_plain_transformers(smoke: Smoke) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(smoke.folder / "aligned")
    tokenizer = AutoTokenizer.from_pretrained(smoke.folder / "aligned")
    ids = tokenizer("Question: 1 + 1", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] == ids.shape[1] + 2


def test_a_second_run_does_nothing_but_say_so(smoke: Smoke) -> None:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *_align(smoke.store, smoke.runs)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Nothing to do" in done.stdout
    assert time.monotonic() - start < 30 or os.getloadavg()[0] > 4
