"""Sampling: our job on one actor beside bare vLLM in one process, on the same cores, in turns.

    python -m benchmarks.sample --json sample.json [--prompts 64] [--n 8] [--rounds 3] [--model FOLDER]

Both give the same prompts, seeds and sampling parameters (temperature 0.7, top_p 0.95, responses of up to 64 tokens
that end where the model ends them). Reported: tokens generated a second of steady state, without start-up, by wall
clock and by CPU time (which a busy machine disturbs less); start-up; what it costs to resume; sizes on disk. A ratio
is the median over the rounds of ours to theirs in the same round. What a job of millions costs: `benchmarks.at_scale`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from transformers import AutoTokenizer

from allo_ray import tables
from allo_ray.config.engine import EngineConfig, EngineResources
from allo_ray.data.inference import INDEXED_FILES, Job, count_rows, sample
from allo_ray.data.inference_work import SampleWork
from allo_ray.data.shard_index import Answered
from allo_ray.data.shards import Shards, name_of
from allo_ray.engines.base import Sampling, sample_seed
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


def resume(rows: int, per_shard: int, folder: Path) -> dict[str, float]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--n", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
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
        (folder / "resume").mkdir()
        found = resume(100_000, 32, folder / "resume")

    def speed(figures: list[dict[str, Any]], seconds: str) -> float:
        return statistics.median(one["tokens"] / one[seconds] for one in figures)

    def ratio(seconds: str) -> float:
        pairs = zip(mine, theirs, strict=True)
        return statistics.median((a["tokens"] / a[seconds]) / (b["tokens"] / b[seconds]) for a, b in pairs)

    steady = statistics.median(one["seconds"] for one in mine)
    resume_share = found["seconds"] / (found["rows"] / (told.prompts / steady))
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
        "resume": found | {"share_of_the_job": resume_share},
        "bytes_per_sample": size / (told.prompts * told.n),
    }
    Path(told.json).write_text(json.dumps(out, indent=1))
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
