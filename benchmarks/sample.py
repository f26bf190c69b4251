"""Sampling: our job on one actor beside bare vLLM in one process, on the same cores, in turns.

    python -m benchmarks.sample --json sample.json [--prompts 64] [--n 8] [--rounds 3] [--resume-prompts 128]

Both give the same prompts, seeds and sampling parameters (temperature 0.7, top_p 0.95, responses of up to 64 tokens
that end where the model ends them). Reported: tokens generated a second of steady state, without start-up, by wall
clock and by CPU time (which a busy machine disturbs less); start-up; sizes on disk. A ratio is the median over the
rounds of ours to theirs in the same round. What a job of millions costs: `benchmarks.at_scale`.

`resume`: a job that is stopped half-way (t1) and run again (t2), against the same job undisturbed (t): t1 + t2 - t in
seconds and as a share of t, with and without the start-up of engines. The seconds do not grow with the job: a start,
what was under way at the stop (at most two batches an actor), and knowing what is done, which is timed alone for
100,000 prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from transformers import AutoTokenizer

from allo_ray import tables
from allo_ray.config.engine import EngineConfig, EngineResources
from allo_ray.data.inference import INDEXED_FILES, Job, count_rows, run, sample
from allo_ray.data.inference_work import Answers, Row, SampleWork
from allo_ray.data.shard_index import Answered
from allo_ray.data.shards import Shards, name_of
from allo_ray.engines.base import Engine, Sampling, sample_seed
from allo_ray.models import smollm2
from benchmarks.inference_peers import Figures, run_peer

SAMPLING = Sampling(temperature=0.7, top_p=0.95, max_tokens=64)
WORKED = "".join(
    f"Question: What is {a} + {b}?\nAnswer: We add {a} and {b}: {a} + {b} = {a + b}. The answer is {a + b}.\n\n"
    for a, b in [(3, 4), (8, 9), (11, 5), (2, 17)]
)


def prompts(model: Path, count: int) -> pa.Table:
    """PROMPTS rows with four worked examples before each question, which all prompts share."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [f"{WORKED}Question: What is {i % 50} + {i // 50}?\nAnswer:" for i in range(count)]
    return tables.PROMPTS.build(
        {
            "id": tables.content_id(text),
            "prompt": text,
            "text": text,
            "prompt_ids": tokenizer(text)["input_ids"],
        }
        | {"reference": None, "answer": None, "group": None}
        for text in texts
    )


def bare(config: EngineConfig, model: Path, rows: pa.Table, n: int) -> Figures:
    """All requests in one call of vllm.LLM."""
    requests = [
        (row["prompt_ids"], sample_seed(0, row["id"], index))
        for row in rows.to_pylist()
        for index in range(n)
    ]
    sampling = {name: value for name, value in asdict(SAMPLING).items() if name not in ("stop", "ignore_eos")}
    return run_peer("bare-sample", config, {"model": str(model), "requests": requests, "sampling": sampling})


def ours(config: EngineConfig, model: Path, rows: pa.Table, n: int, out: Path) -> dict[str, Any]:
    """The job; its facts have the figures."""
    facts = sample(rows, str(model), config, SAMPLING, n, str(out), model_id="benchmark")
    return facts | {"tokens": facts["tokens_out"]}


def known(rows: int, per_shard: int, folder: Path) -> dict[str, float]:
    """Seconds to find out that all is done in a folder of `rows` prompts, as a finished job leaves it."""
    shards = Shards(str(folder / "out"), tables.SAMPLES, "prompt_id")
    shards.claim({})
    names = [f"{i:016x}" for i in range(rows)]
    pq.write_table(pa.table({"id": names}), folder / "ids.parquet")
    text = "We add 3 and 4: 3 + 4 = 7. The answer is 7."
    row = {"index": 0, "seed": 1, "text": text, "response_ids": list(range(20)), "finish_reason": "stop"}
    chunks = [names[first : first + per_shard] for first in range(0, rows, per_shard)]
    files = [
        shards.publish(
            name_of(ids),
            [{"id": one, "prompt_id": one, "answer": None, "verdict": None} | row for one in ids],
        )
        for ids in chunks
    ]
    for first in range(0, len(files), INDEXED_FILES):
        some = slice(first, first + INDEXED_FILES)
        shards.index(Answered.of(files[some], chunks[some]))
    job = Job(folder / "ids.parquet", "", SampleWork(SAMPLING, 1, 0), shards.url)
    start = time.perf_counter()
    assert count_rows(job, shards.done()) == (rows, 0)
    return {"rows": rows, "shards": len(files), "seconds": time.perf_counter() - start}


class Stopped(Exception):
    pass


class Half:
    """Progress that stops the job half-way."""

    def update(self, done: int, total: int, unit: str, **facts: Any) -> None:
        if 2 * done >= total:
            raise Stopped


@dataclass(frozen=True)
class Noted(SampleWork):
    """Sampling that leaves a note when its first batch begins: a job that is stopped tells no figures."""

    note: str = ""

    def answer(self, engine: Engine, rows: Sequence[Row]) -> Answers:
        with suppress(FileExistsError), open(self.note, "x") as file:
            file.write(str(time.time()))
        return super().answer(engine, rows)


def resume(config: EngineConfig, model: Path, rows: pa.Table, n: int, folder: Path) -> dict[str, float]:
    """Seconds of a job undisturbed, of its first half until it was stopped, and of the rest; with start-up, without."""

    def timed(name: str, out: str, progress: Half | None = None) -> tuple[float, float]:
        note = folder / f"{name}.started"
        job = Job(rows, str(model), Noted(SAMPLING, n, 0, note=str(note)), str(folder / out), "benchmark")
        called = time.time()
        with suppress(Stopped):
            run([job], config, progress)
        ended = time.time()
        return ended - called, ended - float(note.read_text())

    runs = [timed("whole", "whole"), timed("first", "halves", Half()), timed("second", "halves")]
    assert len(tables.SAMPLES.read(folder / "halves")) == len(tables.SAMPLES.read(folder / "whole"))
    out = {}
    for label, (whole, first, second) in zip(("", "_without_startup"), zip(*runs, strict=True), strict=True):
        out |= {f"seconds{label}": first + second - whole, f"share{label}": (first + second) / whole - 1}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resume-prompts", type=int, default=128)
    parser.add_argument("--model", type=Path)
    told = parser.parse_args()
    ray.init(num_cpus=(os.cpu_count() or 1) + 4, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = told.model or smollm2(folder / "model")
        config = EngineConfig(max_model_len=1024, pool=EngineResources(kv_cache_gib=0.5, threads=1))
        rows = prompts(model, told.prompts)
        theirs, mine = [], []
        for number in range(told.rounds):
            turns = [
                lambda: theirs.append(bare(config, model, rows, told.n)),
                lambda number=number: mine.append(ours(config, model, rows, told.n, folder / f"out{number}")),
            ]
            for turn in turns if number % 2 == 0 else reversed(turns):
                turn()
        size = sum(file.stat().st_size for file in (folder / "out0").glob("*.parquet"))
        small = config.model_copy(update={"pool": config.pool.model_copy(update={"batch_size": 32})})
        stops = []
        for number in range(told.rounds):
            (folder / f"resume{number}").mkdir()
            asked = prompts(model, told.resume_prompts)
            stops.append(resume(small, model, asked, told.n, folder / f"resume{number}"))
        (folder / "known").mkdir()
        found = known(100_000, 32, folder / "known")

    def speed(figures: list[dict[str, Any]], seconds: str) -> float:
        return statistics.median(one["tokens"] / one[seconds] for one in figures)

    def ratio(seconds: str) -> float:
        pairs = zip(mine, theirs, strict=True)
        return statistics.median((a["tokens"] / a[seconds]) / (b["tokens"] / b[seconds]) for a, b in pairs)

    out = {
        "model": f"SmolLM2-135M-Instruct {config.dtype}, one thread",
        "requests": told.prompts * told.n,
        "rounds": told.rounds,
        "tokens_per_second": {"ours": speed(mine, "seconds"), "vllm": speed(theirs, "seconds")},
        "tokens_per_cpu_second": {"ours": speed(mine, "cpu_seconds"), "vllm": speed(theirs, "cpu_seconds")},
        "ratio": {
            "vs_vllm": ratio("seconds"),
            "vs_vllm_cpu_time": ratio("cpu_seconds"),
        },
        "startup_seconds": statistics.median(one["startup_seconds"] for one in mine),
        "engine_seconds": statistics.median(one["engine_seconds"] for one in mine),
        "cached_share_of_prompt_tokens": mine[-1]["cached"],
        "resume": {name: statistics.median(one[name] for one in stops) for name in stops[0]}
        | {"requests": told.resume_prompts * told.n, "knowing_what_is_done": found},
        "bytes_per_sample": size / (told.prompts * told.n),
    }
    Path(told.json).write_text(json.dumps(out, indent=1))
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
