"""Sampling: our job on one actor beside bare vLLM in one process, on the same cores, in turns.

    python -m benchmarks.sample --json sample.json [--prompts 64] [--n 8] [--rounds 3] [--model FOLDER]

Both give the same prompts, seeds and sampling parameters (temperature 0.7, top_p 0.95, responses of up to 64 tokens
that end where the model ends them). Reported: tokens generated a second of steady state, without start-up, by wall
clock and by CPU time (which a busy machine disturbs less); start-up; what it costs to resume; sizes on disk; and
what these constants say of 10 million prompts x 10 samples on 64 GPUs.
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
import ray
from transformers import AutoTokenizer

from allo_ray import tables
from allo_ray.config.engine import EngineConfig, EngineResources
from allo_ray.data.inference import sample
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
    """Seconds to find out what is done in a folder of `rows` prompts, and bytes of a shard's row."""
    shards = Shards(str(folder), tables.SAMPLES, "prompt_id")
    shards.claim({})
    text = "We add 3 and 4: 3 + 4 = 7. The answer is 7."
    for first in range(0, rows, per_shard):
        ids = [f"{i:016x}" for i in range(first, min(rows, first + per_shard))]
        row = {"index": 0, "seed": 1, "text": text, "response_ids": list(range(20)), "finish_reason": "stop"}
        shards.publish(
            name_of(ids),
            [{"id": one, "prompt_id": one, "answer": None, "verdict": None} | row for one in ids],
        )
    start = time.perf_counter()
    assert len(shards.done()) == rows
    return {"rows": rows, "shards": -(-rows // per_shard), "seconds": time.perf_counter() - start}


def at_scale(row_bytes: float, resume_seconds_a_shard: float) -> dict[str, float]:
    """10 million prompts x 10 samples on 64 GPUs, from measured sizes and one assumed speed.

    Assumed: 5,000 tokens/s out of one GPU (a 7B model, bf16, vLLM), 200 tokens a response, batches of 256 requests.
    """
    prompts_all, n, gpus, tokens, speed, batch = 10e6, 10, 64, 200, 5000, 256
    shards = prompts_all * n / batch
    return {
        "hours": prompts_all * n * tokens / (gpus * speed) / 3600,
        "shards": shards,
        "shards_a_second": gpus * speed / (tokens * batch),
        "gigabytes_on_disk": prompts_all * n * row_bytes / 1e9,
        "driver_id_hashes_gigabytes": prompts_all * 12 * 2 / 1e9,
        "resume_seconds": shards * resume_seconds_a_shard,
    }


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
            theirs.append(bare(config, model, rows, told.n))
            mine.append(ours(config, model, rows, told.n, folder / f"out{number}"))
        size = sum(file.stat().st_size for file in (folder / "out0").glob("*.parquet"))
        found = resume(100_000, 32, folder / "resume")

    def speed(figures: list[dict[str, Any]], seconds: str) -> float:
        return statistics.median(one["tokens"] / one[seconds] for one in figures)

    steady = statistics.median(one["seconds"] for one in mine)
    resume_share = found["seconds"] / (found["rows"] / (told.prompts / steady))
    out = {
        "model": "SmolLM2-135M-Instruct bf16, one thread",
        "requests": told.prompts * told.n,
        "rounds": told.rounds,
        "tokens_per_second": {"ours": speed(mine, "seconds"), "vllm": speed(theirs, "seconds")},
        "tokens_per_cpu_second": {"ours": speed(mine, "cpu_seconds"), "vllm": speed(theirs, "cpu_seconds")},
        "ratio": {
            "vs_vllm": speed(mine, "seconds") / speed(theirs, "seconds"),
            "vs_vllm_cpu_time": speed(mine, "cpu_seconds") / speed(theirs, "cpu_seconds"),
        },
        "startup_seconds": statistics.median(one["startup_seconds"] for one in mine),
        "engine_seconds": statistics.median(one["engine_seconds"] for one in mine),
        "cached_share_of_prompt_tokens": mine[-1]["cached"],
        "resume": found | {"share_of_the_job": resume_share},
        "bytes_per_sample": size / (told.prompts * told.n),
        "ten_million_prompts": at_scale(size / (told.prompts * told.n), found["seconds"] / found["shards"]),
    }
    Path(told.json).write_text(json.dumps(out, indent=1))
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
