"""What sharing saves: a campaign on the smoke preset beside runs that share nothing, by compute.

    python -m benchmarks.campaign --json FILE [--trials 16] [--concurrent 4]

The campaign searches all four thresholds on a grid of two values each: four trials share a forgotten model. Then
half of `--concurrent` of its trials run as `allo align` with an empty store each, multiplied to as many as the campaign
has: all at once, since a machine does less in a CPU second the busier it is, and a run has two stages at work where a
trial has one. All are processes of their own, with clusters of their own.

Compute is CPU time of the driver and all processes below it, start-up of the clusters included, read twice a second;
and, second, the seconds that stages took by the clock, which on a machine with fewer CPUs than stages run side by side
include waiting. `ratio.compute_vs_independent` is by CPU time. `equal` says whether a trial that was run alone gave the
same models, bit for bit, and the same accuracy of every model on every suite; `kl_differs_by` is in nats, and not quite
0 since the rounding of log-probs depends on which rows share a batch. `cache_hits` counts by stage how often a trial
found it in the store, `cpu_by_process` sums CPU seconds by the title that processes had last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import yaml

from allo_ray.config.tune import SHORT
from allo_ray.tune.records import Record, Records

GRIDS = {
    4: {"k1": "grid(0.05, 0.1)", "k2": "grid(0.1, 0.2)"},
    16: {"k1": "grid(0.05, 0.1)", "u": "grid(0.9, 0.95)", "k2": "grid(0.1, 0.2)", "v": "grid(0.2, 0.4)"},
}


class CpuClock(threading.Thread):
    """CPU seconds of a process and all below it, also of those that have ended."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root = psutil.Process(pid)
        self._seen: dict[tuple[int, float], float] = {}
        self._titles: dict[tuple[int, float], str] = {}
        self._over = threading.Event()  # Thread has a method _stop of its own

    def run(self) -> None:
        while not self._over.wait(0.5):
            self._look()

    def seconds(self) -> float:
        """Ends the clock."""
        self._over.set()
        self.join()
        return sum(self._seen.values())

    def by_title(self) -> dict[str, float]:
        """CPU seconds of all processes with one title, the most first."""
        sums: Counter[str] = Counter()
        for process, spent in self._seen.items():
            sums[self._titles[process]] += spent
        return {title: round(spent, 1) for title, spent in sums.most_common() if spent >= 1}

    def _look(self) -> None:
        try:
            processes = [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                told = process.cpu_times()
                one = process.pid, process.create_time()
                title = next(iter(" ".join(process.cmdline()).split()), "")
                if not title.startswith("ray::"):
                    title = process.name()
                if title != "ray::IDLE" or one not in self._titles:
                    self._titles[one] = title
                self._seen[one] = told.user + told.system
            except psutil.NoSuchProcess:
                continue


def job(*words: str) -> dict[str, Any]:
    """Runs `python -m jobs.cli WORDS`; returns its CPU seconds, whose they are, and its seconds by the clock."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "jobs.cli", *words],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    clock = CpuClock(process.pid)
    clock.start()
    code = process.wait()
    spent = clock.seconds()
    if code != 0:
        raise SystemExit(f"allo {' '.join(words)} ended with {code}")
    wall = time.perf_counter() - started
    return {"cpu_seconds": spent, "wall_seconds": wall, "cpu_by_process": clock.by_title()}


def campaign(folder: Path, trials: int, concurrent: int) -> dict[str, Any]:
    """The campaign's figures; its trials are under `records`."""
    told = {
        "name": "shared",
        "base": "smoke",
        "set": {"store": str(folder / "store"), "runs": str(folder / "runs")},
        "space": GRIDS[trials],
        "searcher": "grid",
        "objective": {"suite": "held-out"},
        "concurrent": concurrent,
        "cluster": {"num_cpus": 2 * concurrent},
    }
    (folder / "campaign.yaml").write_text(yaml.safe_dump(told))
    spent = job("tune", "--config", str(folder / "campaign.yaml"))
    summary = json.loads((folder / "runs" / "shared" / "summary.json").read_text())
    if summary["trials"].get("finished") != trials:
        raise SystemExit(f"of {trials} trials there are: {summary['trials']}")
    return {
        **spent,
        "stage_seconds": summary["stage_seconds"]["spent"],
        "stages": summary["stages"],
        "cache_hits": {stage["stage"]: stage["reused"] for stage in summary["stages"]},
        "records": list(Records(folder / "runs" / "shared")),
    }


def alone(folder: Path, shared: Path, record: Record) -> dict[str, Any]:
    """One trial as a run of its own, with an empty store; `equal` where its trained deltas have the trial's bytes."""
    settings = {SHORT[name]: value for name, value in record.values.items()}
    settings |= {"name": "alone", "store": str(folder / "store"), "runs": str(folder / "runs")}
    spent = job("align", "--config", "smoke", *(f"--set={name}={value}" for name, value in settings.items()))
    summary = json.loads((folder / "runs" / "alone" / "summary.json").read_text())
    models = [Path(record.artifacts[name]) / "delta.safetensors" for name in ("warmup", "forget", "learn")]
    same = [
        (folder / "store" / file).read_bytes() == (shared / "store" / file).read_bytes() for file in models
    ]
    kl: list[float] = []
    for label, suites in record.scores.items():
        for suite, scores in suites.items():
            found = summary["models"][label][suite]
            if suite == "kl":
                kl.append(abs(found["mean"] - scores["kl"]))
            else:
                same.append(found["accuracy"] == scores["accuracy"])
    return {
        "values": record.values,
        **spent,
        "stage_seconds": sum(stage["seconds"] for stage in summary["stages"] if not stage["cached"]),
        "equal": all(same),
        "kl_differs_by": max(kl),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    parser.add_argument("--trials", type=int, default=16, choices=sorted(GRIDS))
    parser.add_argument("--concurrent", type=int, default=4)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        at_once = max(1, told.concurrent // 2)
        folders = [Path(name) / str(number) for number in range(at_once + 1)]
        for folder in folders:
            folder.mkdir()
        shared = campaign(folders[0], told.trials, told.concurrent)
        records = shared.pop("records")
        chosen = [records[-1 - 5 * number % len(records)] for number in range(at_once)]
        with ThreadPoolExecutor(at_once) as pool:
            runs = list(pool.map(lambda one, record: alone(one, folders[0], record), folders[1:], chosen))

    def independent(figure: str) -> float:
        return told.trials * sum(run[figure] for run in runs) / len(runs)

    out = {
        "trials": told.trials,
        "at_a_time": told.concurrent,
        "campaign": shared,
        "alone": runs,
        "ratio": {
            "compute_vs_independent": shared["cpu_seconds"] / independent("cpu_seconds"),
            "stage_seconds_vs_independent": shared["stage_seconds"] / independent("stage_seconds"),
        },
    }
    Path(told.json).write_text(json.dumps(out, indent=1))
    print(json.dumps(out, indent=1))
    if not all(run["equal"] for run in runs):
        raise SystemExit("a trial and its lone run differ")


if __name__ == "__main__":
    main()
