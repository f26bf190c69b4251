"""The whole method on a tiny random model, through the same real parts as a big run, by a real `ray job submit`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from allo_ray import tables
from allo_ray.neurons.delta import load
from allo_ray.tune.records import Records
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
    #: Names of all metrics that the nodes' endpoints had while it ran.
    exported: frozenset[str]

    @property
    def folder(self) -> Path:
        return self.runs / "smoke"

    def artifact(self, stage: str) -> Path:
        return self.store / stage / self.summary["artifacts"][stage]


class Scraper(threading.Thread):
    """Reads every node's metrics over HTTP, as Prometheus would: from the targets that Ray lists for it."""

    def __init__(self, targets: Path) -> None:
        super().__init__(daemon=True)
        self.targets = targets
        self.names: set[str] = set()
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.5):
            for target in json.loads(self.targets.read_text())[0]["targets"]:
                try:
                    text = urllib.request.urlopen(f"http://{target}/metrics", timeout=10).read().decode()
                except OSError:  # a node that is not up yet
                    continue
                lines = (line for line in text.splitlines() if not line.startswith("#"))
                self.names.update(line.partition("{")[0] for line in lines)


def _align(store: Path, runs: Path) -> list[str]:
    settings = [f"store={store}", f"runs={runs}", "track.tensorboard={}"]
    return ["align", "--config", "smoke", *(word for setting in settings for word in ("--set", setting))]


@pytest.fixture(scope="module")
def smoke(local_cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Smoke]:
    """One run on a cluster of its own nodes, submitted as a user would."""
    folder = tmp_path_factory.mktemp("smoke")
    store, runs = folder / "store", folder / "runs"
    local_cluster.run("add", "workers", "--num-cpus", "6")
    head = Path(local_cluster.environment["ALLO_CLUSTER_DIR"]) / "head"
    scraper = Scraper(head / "prom_metrics_service_discovery.json")
    scraper.start()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "jobs.cli", "submit", "--", *_align(store, runs)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**local_cluster.environment, "RAY_API_SERVER_ADDRESS": local_cluster.dashboard},
        timeout=1400,
    )
    scraper.ended.set()
    scraper.join()
    local_cluster.run("kill", "workers")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    summary = json.loads((runs / "smoke" / "summary.json").read_text())
    return Smoke(store, runs, summary, done.stdout, frozenset(scraper.names))


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


def test_every_metric_of_the_dashboard_is_exported(smoke: Smoke) -> None:
    board = (ROOT / "cluster" / "grafana-dashboard.json").read_text()
    expressions = [
        target["expr"] for panel in json.loads(board)["panels"] for target in panel.get("targets", ())
    ]
    shown = {name for expression in expressions for name in re.findall(r"\bray_\w+", expression)}
    assert len(shown) >= 12
    assert shown <= smoke.exported


def test_the_samples_measure_how_far_each_model_has_moved(smoke: Smoke) -> None:
    """24 prompts x 2 samples; the SFT model is at 0 from itself, and full-parameter DPO has moved."""
    told = {label: suites["kl"] for label, suites in smoke.summary["models"].items()}
    assert told["SFT"] == {"mean": 0.0, "standard_error": 0.0, "n": 48}
    assert told["DPO"]["mean"] != 0
    assert (smoke.folder / "tensorboard").is_dir(), "asked for by the config"


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


def test_a_campaign_starts_from_what_the_run_has_made(
    smoke: Smoke, local_cluster: LocalCluster, tmp_path: Path
) -> None:
    """Two v: one is the run's own, so its trial is that run and takes no work; the other learns and is asked alone."""
    campaign = {
        "name": "drop",
        "base": "smoke",
        "set": {"store": str(smoke.store), "runs": str(tmp_path / "runs")},
        "space": {"v": "grid(0.34, 0.2)"},
        "searcher": "grid",
        "objective": {"suite": "held-out"},
    }
    file = tmp_path / "campaign.yaml"
    file.write_text(yaml.safe_dump(campaign))

    def allo(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "jobs.cli", *words],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**local_cluster.environment, "RAY_API_SERVER_ADDRESS": local_cluster.dashboard},
            timeout=900,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    local_cluster.run("add", "trials", "--num-cpus", "5")
    log = allo("submit", "--", "tune", "--config", str(file))
    local_cluster.run("kill", "trials")
    folder = tmp_path / "runs" / "drop"
    assert "warmup: in the store" in log
    assert str(folder / "best.yaml") in log
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["trials"] == {"asked": 2, "finished": 2}
    assert "Best config" in (folder / "report.html").read_text()
    records = {record.values["v"]: record for record in Records(folder)}
    same = {name: path.partition("/")[2] for name, path in records[0.34].artifacts.items()}
    assert same == same | smoke.summary["artifacts"]
    accuracy = smoke.summary["models"]["ALLO"]["held-out"]["accuracy"]
    assert records[0.34].scores["ALLO"]["held-out"]["accuracy"] == accuracy
    made = {
        stage: len(list((smoke.store / stage).iterdir())) for stage in ("sft", "warmup", "forget", "learn")
    }
    assert made == {"sft": 1, "warmup": 1, "forget": 1, "learn": 2}
    plan = allo("align", "--config", str(folder / "best.yaml"), "--dry-run")
    assert "cached  learn" in plan
    assert "to do" not in plan
