"""A node lost in the middle of each stage that works off the head: what that costs, and whether the result is the same.

    python -m benchmarks.node_loss FOLDER [--stages STAGE ...]

On a real local cluster (cluster/local.sh: a head without CPUs, three more nodes) the smoke preset runs by `allo submit`
in float32, undisturbed. Then a copy of its store without the results of one stage runs again; in the middle of that
stage the node at work is killed (SIGKILL to the raylet and everything below it) and replaced. What the stage published
is compared: tables row by row, weights bit by bit, an engine's log-probs within 1e-5. So it goes on, stage by stage;
what FOLDER holds is not measured again, and one that is broken off goes on where it was.

The other stages (model, prompts, pairs, rewrite with the arithmetic teacher, and on a model this small importance and
locate) work in the driver, on the head. A run that loses its driver goes on when it is started again:
tests/test_resume.py.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
NODES = 3
TASK = "{steps: 2, limit: 30, form: bare, train: 200, sft: 200, test: 300}"
#: Small steps and batches, so that every stage lasts long enough to be hit in its middle.
SETTINGS = (
    f"data.args={TASK}",
    f"sft.data.args={TASK}",
    "pair.limit=400",
    "reward.limit=200",
    "engine.dtype=float32",
    "engine.pool.batch_size=8",
    "engine.pool.batches_in_flight=1",
    f"evaluate.suites=[{{name: arithmetic, limit: 120, args: {TASK}}}]",
    "trainer.micro_batch_tokens=64",
    "trainer.checkpoint_every=2",
    *(f"{stage}.dtype=float32" for stage in ("sft", "warmup", "reward", "forget", "learn")),
    *(f"{stage}.batch_size=2" for stage in ("sft", "reward")),
    *(f"{stage}.batch_size=4" for stage in ("warmup", "forget", "learn")),
)
#: Columns that tell times and memory, never a result.
MEASURED = {"seconds", "tokens_per_second", "peak_rss", "peak_gpu"}
#: Log-probs of an engine depend by as much on what else is in its batch; after a loss that is something else.
ENGINE_ROUNDING = 1e-5
PATIENCE_SECONDS = 1200.0


@dataclass(frozen=True)
class Middle:
    """When a stage is in its middle, and what it then publishes.

    work: its folder is called <work>-<key>. sign, least: there are so many of these in it.
    worker: what the command line of the process says that does the work. kinds: of its artifacts.
    """

    work: str
    sign: str
    least: int
    worker: str
    kinds: tuple[str, ...]


def _trained(stage: str) -> Middle:
    # Of two checkpoints the first is whole.
    return Middle(stage, "run/step-*", 2, "RayTrainWorker", (stage,))


STAGES = {
    "sft": _trained("sft"),
    "sample": Middle("sample", "samples/*.parquet", 1, "InferenceActor", ("sample",)),
    # All its pairs are one shard, so none is there in its middle.
    "reference": Middle("reference", "logprobs/*.parquet", 0, "LogprobActor", ("reference",)),
    "warmup": _trained("warmup"),
    "reward": _trained("reward"),
    "token_scores": Middle("token_scores", "scores/*.parquet", 1, "InferenceActor", ("token_scores",)),
    "forget": _trained("forget"),
    "learn": _trained("learn"),
    "evaluate": Middle(
        "answers", "samples/*.parquet", 1, "InferenceActor", ("evaluate", "answers", "sample_logprobs")
    ),
}


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
        """Output of `cluster/local.sh ARGUMENTS`."""
        words = [str(ROOT / "cluster" / "local.sh"), *arguments]
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment)
        if done.returncode:
            raise SystemExit(f"local.sh {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    @contextmanager
    def align(self, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
        """`allo submit -- align` into `folder`; the block ends when the run does, which has to succeed."""
        exports = dict(word.split("=", 1) for word in self.command("env").split()[1:])
        settings = [f"store={folder / 'store'}", f"runs={folder / 'runs'}", *SETTINGS]
        words = ["submit", "--", "align", "--config", "smoke"]
        words += [word for setting in settings for word in ("--set", setting)]
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log"
        with log.open("wb") as file:
            run = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", *words],
                cwd=ROOT,
                env={**self.environment, **exports},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        try:
            yield run
            if run.wait(PATIENCE_SECONDS):
                raise SystemExit(f"the run failed; see {log}:\n{log.read_text()[-3000:]}")
        finally:
            run.kill()

    def node_of(self, worker: str) -> str | None:
        """The node with a process that has `worker` in its command line."""
        for file in self.folder.glob("node*.pid"):
            with suppress(psutil.NoSuchProcess):
                for process in psutil.Process(int(file.read_text().split()[0])).children(recursive=True):
                    if worker in " ".join(process.cmdline()):
                        return file.stem
        return None


@contextmanager
def started() -> Iterator[Cluster]:
    """A cluster for the time of the block."""
    # Short: Ray puts sockets below it, whose paths have at most 107 characters.
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="allo-", dir="/tmp")))
    try:
        cluster.command("start", str(NODES))
        yield cluster
    finally:
        cluster.command("stop")
        shutil.rmtree(cluster.folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="takes stores, logs, and a JSON file for each stage")
    parser.add_argument("--stages", nargs="+", choices=[*STAGES], default=[*STAGES], help="by default all")
    told = parser.parse_args()
    folder = told.folder.resolve()
    files = {stage: folder / f"{stage}.json" for stage in STAGES}
    if missing := [stage for stage in told.stages if not files[stage].exists()]:
        with started() as cluster:
            calm = folder / "calm"
            if not (calm / "runs" / "smoke" / "summary.json").exists():
                with cluster.align(calm):
                    pass
            for stage in missing:
                record = lose(cluster, calm / "store", folder / stage, STAGES[stage])
                files[stage].write_text(json.dumps(record, indent=1))
    records = {stage: json.loads(file.read_text()) for stage, file in files.items() if file.exists()}
    print(table(records))
    sys.exit(any(record["differing"] for record in records.values()))


def lose(cluster: Cluster, calm: Path, folder: Path, middle: Middle) -> dict[str, Any]:
    """Runs one stage again in a copy of the store `calm`, with its node killed on the way; what became of it."""
    shutil.rmtree(folder, ignore_errors=True)
    store = folder / "store"
    shutil.copytree(calm, store)
    for kind in middle.kinds:
        shutil.rmtree(store / kind)
    with cluster.align(folder) as run:
        while (caught := _caught(cluster, store, middle)) is None:
            if run.poll() is not None:
                raise SystemExit(f"{folder.name} was never seen in its middle; see {folder / 'log'}")
            time.sleep(0.02)
        work, node, there = caught
        cluster.command("kill", node)
        if not work.exists():
            raise SystemExit(f"{folder.name} was over before its node was gone: it has to last longer")
        cluster.command("add", node, "--num-cpus", "2")
    before, after = (_told(root / middle.kinds[0]) for root in (calm, store))
    resumed = after[0]["facts"].get("resumed_at")
    return {
        "went_on_from": f"{there} shards" if resumed is None else f"step {resumed}",
        "seconds": sum(told["seconds"] for told in before),
        "seconds_with_loss": sum(told["seconds"] for told in after),
        "differing": differing(calm, store, middle.kinds),
    }


def _caught(cluster: Cluster, store: Path, middle: Middle) -> tuple[Path, str, int] | None:
    """A work folder in its middle, the node at work, and how much lies there."""
    for work in (store / ".work").glob(f"{middle.work}-*"):
        there = len(list(work.glob(middle.sign)))
        if there >= middle.least and (node := cluster.node_of(middle.worker)) is not None:
            return work, node, there
    return None


def _told(kind: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(kind.glob("*/artifact.json"))]


def table(records: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| stage | went on from | seconds, undisturbed | with its node lost | result |",
        "|---|---|---|---|---|",
    ]
    for stage, told in records.items():
        result = f"DIFFERS: {', '.join(told['differing'])}" if told["differing"] else "the same"
        lines.append(
            f"| {stage} | {told['went_on_from']} | {told['seconds']:.0f} | {told['seconds_with_loss']:.0f} | {result} |"
        )
    return "\n".join(lines)


def differing(one: Path, two: Path, kinds: tuple[str, ...]) -> list[str]:
    """Artifacts (kind/key) of two stores whose content is not the same, or that only one of them has."""
    first, second = (
        {f"{kind}/{path.name}" for kind in kinds for path in (store / kind).iterdir()} for store in (one, two)
    )
    return sorted(first ^ second) + [key for key in sorted(first & second) if not same(one / key, two / key)]


def same(one: Path, two: Path) -> bool:
    """Whether the weights of two artifacts are the same bytes, and their tables the same rows but for rounding."""
    first, second = contents(one), contents(two)
    return first.keys() == second.keys() and all(
        exact == second[name][0]
        and floats.shape == second[name][1].shape
        and np.allclose(floats, second[name][1], rtol=0, atol=ENGINE_ROUNDING)
        for name, (exact, floats) in first.items()
    )


def contents(root: Path) -> dict[str, tuple[Any, np.ndarray]]:
    """File of weights -> its bytes. Table, a file or a folder of shards -> its rows without floats, in one order, and
    all their floats."""
    out: dict[str, tuple[Any, np.ndarray]] = {
        str(file.relative_to(root)): (file.read_bytes(), np.zeros(0)) for file in root.rglob("*.safetensors")
    }
    found: dict[str, list[pa.Table]] = {}
    for file in root.rglob("*.parquet"):
        whole = file.parent if (file.parent / "owner.json").exists() else file
        found.setdefault(str(whole.relative_to(root)), []).append(pq.read_table(file))
    for name, parts in found.items():
        rows: list[tuple[str, list[float]]] = []
        for row in pa.concat_tables(parts).drop_columns([*MEASURED & set(parts[0].column_names)]).to_pylist():
            floats = {column: numbers for column, value in row.items() if (numbers := _floats(value))}
            exact = {column: value for column, value in row.items() if column not in floats}
            told = [one for many in floats.values() for one in many]
            rows.append((json.dumps(exact, default=str), told))
        rows.sort()
        out[name] = [key for key, _ in rows], np.array([one for _, told in rows for one in told])
    return out


def _floats(value: Any) -> list[float]:
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, float)]


if __name__ == "__main__":
    main()
