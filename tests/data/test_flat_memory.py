"""A batch job holds as much for a large input as for a small one."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray import cloudpickle

from allo_ray.data.inference import Job, run
from allo_ray.data.inference_actor import private_bytes
from allo_ray.data.inference_work import Answers, SampleWork
from allo_ray.engines.base import Engine
from tests.data.inference_jobs import SAMPLING, engine, samples

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@dataclass(frozen=True)
class Measure(SampleWork):
    """Asks the engine nothing; its rows are large."""

    columns = ("id", "text")

    def problem(self, row: Any, max_model_len: int) -> str | None:
        return None

    def answer(self, engine: Engine, rows: Any) -> Answers:
        told = {
            "index": 0,
            "seed": 0,
            "response_ids": [],
            "finish_reason": "stop",
            "answer": None,
            "verdict": None,
        }
        out = [{"id": row["id"], "prompt_id": row["id"], "text": row["text"][:40], **told} for row in rows]
        return Answers(out, 0, 0)


class Peak:
    """Largest private memory of this process while it is open, in bytes."""

    def __enter__(self) -> Peak:
        self.bytes = 0
        self._open = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._thread.join()

    def _watch(self) -> None:
        while self._open:
            self.bytes = max(self.bytes, private_bytes())
            time.sleep(0.02)


def test_memory_does_not_grow_with_the_input(ray_cluster: None, tiny_qwen: Path, tmp_path: Path) -> None:
    """2,000 rows of 40 kB (80 MB) against 100: the driver's and the actor's peaks stay within 10 %."""

    def rows(count: int) -> Path:
        folder = tmp_path / f"rows{count}"
        folder.mkdir()
        draw = np.random.default_rng(0)
        for part in range(count // 100):
            texts = [draw.bytes(20_000).hex() for _ in range(100)]
            ids = [f"{part}-{i}" for i in range(100)]
            pq.write_table(pa.table({"id": ids, "text": texts}), folder / f"{part:03d}.parquet")
        return folder

    peaks, actors = [], []
    inputs = {count: rows(count) for count in (100, 2000)}
    for count, path in inputs.items():
        job = Job(path, str(tiny_qwen), Measure(SAMPLING, 1, 0), str(tmp_path / f"out{count}"))
        with Peak() as peak:
            facts = run([job], engine(batch=100))[0]
        assert facts["rows"] == count == len(samples(tmp_path / f"out{count}"))
        peaks.append(peak.bytes)
        actors.append(facts["peak_private_bytes"])
    assert peaks[1] < 1.1 * peaks[0]
    assert actors[1] < 1.1 * actors[0]
