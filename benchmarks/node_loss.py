"""A node lost in the middle of each main stage of a run, on a real local cluster; the result is that of a calm run.

    python -m benchmarks.node_loss --json node_loss.json

A head without CPUs and three more nodes (cluster/local.sh). The smoke preset runs twice by `allo submit`, in float32:
once undisturbed, once with the node that does the work killed in sample, warmup, forget, learn and evaluate in turn
(SIGKILL to the raylet and everything below it), each time replaced by a new one. Then both stores are compared,
artifact by artifact: tables row by row, weights bit by bit; an engine's log-probs within 1e-5. Times may differ.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
NODES = 3
STAGES = ("sample", "warmup", "forget", "learn", "evaluate")
#: What a stage's work folder is called: evaluation works in that of each model's answers.
FOLDERS = {"evaluate": "answers"}
#: Small steps and batches, so that every stage lasts long enough to be hit in its middle.
SETTINGS = (
    "data.args={train: 200, sft: 16, test: 300}",
    "sft.data.args={train: 200, sft: 16, test: 300}",
    "pair.limit=400",
    "engine.dtype=float32",
    "engine.pool.batch_size=8",
    "engine.pool.batches_in_flight=1",
    "evaluate.suites=[{name: arithmetic, limit: 120, args: {steps: 2, limit: 30, form: bare, train: 200, sft: 16, "
    "test: 300}}]",
    "trainer.micro_batch_tokens=64",
    "trainer.checkpoint_every=2",
    *(f"{stage}.dtype=float32" for stage in ("sft", "warmup", "reward", "forget", "learn")),
    *(f"{stage}.batch_size=4" for stage in ("warmup", "forget", "learn")),
)
#: Columns and files that tell times and memory, or who did the work, never a result.
MEASURED = ("seconds", "tokens_per_second", "peak_rss", "peak_gpu")
#: Log-probs of an engine depend by as much on what else is in its batch; after a loss that is something else.
ENGINE_ROUNDING = 1e-5
PATIENCE_SECONDS = 1200.0


@dataclass(frozen=True)
class Loss:
    """One killed node: in which stage, how much of it was there, and what the stage took with and without."""

    stage: str
    node: str
    there: str
    resumed: str
    seconds_undisturbed: float
    seconds_with_loss: float
    same_result: bool


class Cluster:
    """A cluster of cluster/local.sh in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        programs = str(Path(sys.executable).parent)
        self.folder = folder
        self.environment = {
            **kept,
            "ALLO_CLUSTER_DIR": str(folder),
            "ALLO_BIN": programs,
            "ALLO_HEAD_CPUS": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{programs}:{kept['PATH']}",
        }

    def command(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(ROOT / "cluster" / "local.sh"), *arguments],
            capture_output=True,
            text=True,
            env=self.environment,
        )
        if done.returncode:
            raise SystemExit(f"local.sh {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, store: Path, runs: Path, log: Path) -> subprocess.Popen[bytes]:
        """Starts `allo submit -- align ...`; its output goes to `log`."""
        exports = dict(word.split("=", 1) for word in self.command("env").split()[1:])
        settings = [f"store={store}", f"runs={runs}", *SETTINGS]
        words = ["submit", "--", "align", "--config", "smoke"]
        words += [word for setting in settings for word in ("--set", setting)]
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *words],
            cwd=ROOT,
            env={**self.environment, **exports},
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
        )

    def node_of(self, wanted: Any) -> str | None:
        """The node with a process for which `wanted` is true."""
        for file in self.folder.glob("node*.pid"):
            try:
                family = psutil.Process(int(file.read_text().split()[0])).children(recursive=True)
            except psutil.NoSuchProcess:
                continue
            for process in family:
                try:
                    if wanted(process):
                        return file.stem
                except psutil.NoSuchProcess:
                    continue
        return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--keep", type=Path, help="keep both stores and logs in this folder")
    told = parser.parse_args()
    work = told.keep or Path(tempfile.mkdtemp(prefix="allo-loss-", dir="/tmp"))
    work.mkdir(parents=True, exist_ok=True)
    # Short: Ray puts sockets below it, whose paths have at most 107 characters.
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="allo-", dir="/tmp")))
    try:
        cluster.command("start", str(NODES))
        calm = _wait(cluster.submit(work / "calm", work / "calm-runs", work / "calm.log"), work / "calm.log")
        started = time.monotonic()
        run = cluster.submit(work / "store", work / "runs", work / "run.log")
        killed = {stage: _lose(cluster, run, work / "store", stage, work / "run.log") for stage in STAGES}
        _wait(run, work / "run.log")
        disturbed = time.monotonic() - started
    finally:
        cluster.command("stop")
        shutil.rmtree(cluster.folder, ignore_errors=True)
    differing = list(differences(work / "calm", work / "store"))
    losses = [_loss(work, stage, *killed[stage], differing) for stage in STAGES]
    report = {
        "nodes": NODES + 1,
        "artifacts": sum(1 for _ in (work / "calm").glob("*/*/artifact.json")),
        "differing": differing,
        "seconds_undisturbed": round(calm, 1),
        "seconds_with_losses": round(disturbed, 1),
        "losses": [asdict(loss) for loss in losses],
    }
    if told.json:
        told.json.write_text(json.dumps(report, indent=1))
    if not told.keep:
        shutil.rmtree(work)
    print(table(report))
    sys.exit(bool(differing))


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| stage | done when its node was killed | went on from | seconds, undisturbed | with the loss | result |",
        "|---|---|---|---|---|---|",
    ]
    for loss in report["losses"]:
        result = "the same" if loss["same_result"] else "DIFFERS"
        lines.append(
            f"| {loss['stage']} | {loss['there']} | {loss['resumed']} | {loss['seconds_undisturbed']:.0f} | "
            f"{loss['seconds_with_loss']:.0f} | {result} |"
        )
    lines.append(
        f"\n{report['artifacts']} artifacts, {len(report['differing'])} differ. The whole run: "
        f"{report['seconds_undisturbed']:.0f} s undisturbed, {report['seconds_with_losses']:.0f} s with "
        f"{len(report['losses'])} nodes lost."
    )
    return "\n".join(lines)


def _wait(run: subprocess.Popen[bytes], log: Path) -> float:
    started = time.monotonic()
    if run.wait():
        raise SystemExit(f"the run failed; see {log}:\n{log.read_text()[-3000:]}")
    return time.monotonic() - started


def _lose(
    cluster: Cluster, run: subprocess.Popen[bytes], store: Path, stage: str, log: Path
) -> tuple[str, str]:
    """Waits until the stage is in its middle, kills its node, starts a new one; returns the node and what was done."""
    patience = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < patience and run.poll() is None:
        for folder in (store / ".work").glob(f"{FOLDERS.get(stage, stage)}-*"):
            there, node = _trained(cluster, folder) if stage in STAGES[1:4] else _answered(cluster, folder)
            if there and node:
                cluster.command("kill", node)
                cluster.command("add", node, "--num-cpus", "2")
                return node, there
        time.sleep(0.05)
    raise SystemExit(f"{stage} was never seen in its middle; see {log}:\n{log.read_text()[-3000:]}")


def _trained(cluster: Cluster, folder: Path) -> tuple[str, str | None]:
    """The last step told of a training job that has a checkpoint, and its node."""
    if len(list((folder / "run").glob("step-*"))) < 2:  # the first of them is whole
        return "", None
    try:
        told = json.loads((folder / "progress.json").read_text())
    except (OSError, ValueError):
        return "", None
    return f"{told['done']} steps", cluster.node_of(lambda process: process.pid == told["pid"])


def _answered(cluster: Cluster, folder: Path) -> tuple[str, str | None]:
    """How many shards a batch job has published, and its engine's node."""
    count = len(list((folder / "samples").glob("*.parquet")))
    if not count:
        return "", None
    return f"{count} shards", cluster.node_of(lambda process: "InferenceActor" in " ".join(process.cmdline()))


def _loss(work: Path, stage: str, node: str, there: str, differing: list[str]) -> Loss:
    def seconds(store: str) -> float:
        return sum(
            json.loads(file.read_text())["seconds"] for file in (work / store / stage).glob("*/artifact.json")
        )

    resumed = "the rows left"
    if stage in STAGES[1:4]:
        [facts] = (work / "store" / stage).glob("*/train.json")
        resumed = f"step {json.loads(facts.read_text())['resumed_at']}"
    own = (stage, FOLDERS.get(stage, stage))
    same = not [name for name in differing if name.split("/")[0] in own]
    return Loss(stage, node, there, resumed, round(seconds("calm"), 1), round(seconds("store"), 1), same)


def differences(one: Path, two: Path) -> Iterator[str]:
    """Artifacts of two stores (stage/key) whose content is not the same, or that only one has."""
    keys = [
        {str(file.parent.relative_to(store)) for file in store.glob("*/*/artifact.json")}
        for store in (one, two)
    ]
    for key in sorted(keys[0] | keys[1]):
        if key not in keys[0] or key not in keys[1] or not _same(one / key, two / key):
            yield key


def _same(one: Path, two: Path) -> bool:
    """Whether tables and weights of two artifacts are equal; rows of a table of shards in any order of shards."""
    weights = [{str(file.relative_to(root)) for file in root.rglob("*.safetensors")} for root in (one, two)]
    if weights[0] != weights[1]:
        return False
    for name in weights[0]:
        first, second = load_file(one / name), load_file(two / name)
        if first.keys() != second.keys() or not all(first[key].equal(second[key]) for key in first):
            return False
    first, second = _tables(one), _tables(two)
    return first.keys() == second.keys() and all(
        first[name][0] == second[name][0]
        and len(first[name][1]) == len(second[name][1])
        and np.allclose(first[name][1], second[name][1], rtol=0, atol=ENGINE_ROUNDING)
        for name in first
    )


def _tables(root: Path) -> dict[str, tuple[list[str], np.ndarray]]:
    """Folder or file of each table -> its rows without floats and times, in one order, and all their floats."""
    found: dict[str, list[pa.Table]] = {}
    for file in sorted(root.rglob("*.parquet")):
        shards = file.parent != root and (file.parent / "owner.json").exists()
        name = str((file.parent if shards else file).relative_to(root))
        found.setdefault(name, []).append(pq.read_table(file))
    out = {}
    for name, tables in found.items():
        rows: dict[
            str, list[float]
        ] = {}  # a batch that was answered twice stands there twice; readers take it once
        for row in pa.concat_tables(tables).to_pylist():
            told = {column: value for column, value in row.items() if column not in MEASURED}
            floats = [value for column in told for value in _floats(told[column])]
            exact = {column: value for column, value in told.items() if not _floats(value)}
            rows.setdefault(json.dumps(exact, default=str), floats)
        order = sorted(rows)
        out[name] = order, np.array([value for key in order for value in rows[key]])
    return out


def _floats(value: Any) -> list[float]:
    several = value if isinstance(value, list) else [value]
    return [one for one in several if isinstance(one, float)]


if __name__ == "__main__":
    main()
