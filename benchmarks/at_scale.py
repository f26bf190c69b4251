"""What 10 million prompts x 10 samples on 64 GPUs cost, and what breaks first.

    python -m benchmarks.at_scale --json at_scale.json [--prompts 10e6] [--n 10] [--gpus 64] [--tokens-per-second 5586]

Measured here, on one CPU, with made-up text of the asked lengths: bytes on disk, time to publish a shard, time and
memory of knowing what is done, of preparing prompts and of judging samples, and the CPU time of the driver and the
object store's fill of a real job whose engine answers at once. Not measurable here, so an argument: tokens a second of
one GPU. Its default is LLaMA 7B in FP16 on an A100, 128 tokens in and 128 out, batches of 384: 5,586 tokens/s
(NVIDIA, TensorRT-LLM 0.6.1, docs/source/performance.md).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray._private.internal_api import node_stats

from allo_ray import tables
from allo_ray.config.data import DataConfig, VerifyConfig
from allo_ray.config.engine import EngineConfig, EngineResources
from allo_ray.data.inference import Job, count_rows, run
from allo_ray.data.inference_work import Answers, SampleWork
from allo_ray.data.lookup import Lookup, write_stream
from allo_ray.data.prepare import prepare_prompts
from allo_ray.data.shard_index import Answered
from allo_ray.data.shards import Shards, name_of
from allo_ray.data.tokenise import Tokeniser
from allo_ray.data.verdicts import verdicts_of
from allo_ray.engines.base import Engine, Sampling
from allo_ray.models import tiny_model
from allo_ray.session import quiet, start_local
from allo_ray.train.process import peak_rss

MILLION, GIB = 10**6, 1 << 30
#: Words of made-up text, their lengths drawn once; a word counts as 1.3 tokens.
_DRAW = np.random.default_rng(0)
_WORDS = ["".join(chr(97 + c) for c in _DRAW.integers(0, 26, size=_DRAW.integers(2, 9))) for _ in range(4000)]
_TOKENS_A_WORD, _VOCABULARY = 1.3, 32_000


def text(tokens: int, draw: np.random.Generator) -> str:
    """Made-up text; words as frequent as Zipf has it, so that it packs about as real text does."""
    picks = draw.zipf(1.2, size=round(tokens / _TOKENS_A_WORD)) % len(_WORDS)
    return " ".join(_WORDS[at] for at in picks)


def ids(tokens: int, draw: np.random.Generator) -> list[int]:
    return (draw.zipf(1.2, size=tokens) % _VOCABULARY).tolist()


def sample_rows(names: Sequence[str], n: int, tokens: int) -> list[dict[str, Any]]:
    """Rows of SAMPLES for some prompts."""
    draw = np.random.default_rng(len(names))
    return [
        {
            "id": tables.content_id(name, index),
            "prompt_id": name,
            "index": index,
            "seed": int(draw.integers(1 << 62)),
        }
        | {"text": text(tokens, draw), "response_ids": ids(tokens, draw), "finish_reason": "stop"}
        | {"answer": "42", "verdict": index % 2 == 0}
        for name in names
        for index in range(n)
    ]


@dataclass(frozen=True)
class Ready(SampleWork):
    """Sampling whose answers are there already: what a job costs beside its engine."""

    tokens: int = 128

    def answer(self, engine: Engine, rows: Any) -> Answers:
        out = sample_rows([row["id"] for row in rows], self.n, self.tokens)
        return Answers(out, sum(len(row["prompt_ids"]) for row in rows), len(out) * self.tokens)


@contextmanager
def peak_of_object_store() -> Iterator[dict[str, int]]:
    """The most bytes that the node's object store held while this was open."""
    told, ended = {"bytes": 0}, threading.Event()
    [node] = ray.nodes()

    def watch() -> None:
        while not ended.wait(0.1):
            stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], False).store_stats
            told["bytes"] = max(told["bytes"], stats.object_store_bytes_used)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield told
    finally:
        ended.set()
        thread.join()


def measure_ids(folder: Path, rows: int, per_shard: int) -> dict[str, float]:
    """What the driver pays to know which of `rows` prompts are done, in shards of `per_shard` that an index names."""
    names = [f"{i:016x}" for i in range(rows)]
    pq.write_table(pa.table({"id": names}), folder / "ids.parquet")
    shards = Shards(str(folder / "known"), tables.SAMPLES, "prompt_id")
    shards.claim({})
    chunks = [names[first : first + per_shard] for first in range(0, rows, per_shard)]
    files = [shards.file(name_of(chunk)) for chunk in chunks]
    for file in files:  # what an index names is not opened, so these may be empty
        (folder / "known" / file).touch()
    step = 1024
    for first in range(0, len(files), step):
        shards.index(Answered.of(files[first : first + step], chunks[first : first + step]))
    size = sum(file.stat().st_size for file in (folder / "known" / "index").iterdir())
    del chunks, files, names
    before, start = peak_rss(), time.perf_counter()
    done = shards.done()
    known = time.perf_counter() - start
    job = Job(folder / "ids.parquet", "", SampleWork(Sampling(), 1, 0), str(folder / "known"))
    start = time.perf_counter()
    assert count_rows(job, done) == (rows, 0)
    counted = time.perf_counter() - start
    grown = peak_rss() - before
    return {
        "index_bytes_a_prompt": size / rows,
        "done_seconds_a_million_prompts": known * MILLION / rows,
        "count_seconds_a_million_prompts": counted * MILLION / rows,
        "driver_bytes_a_prompt": grown / rows,
    }


def measure_shards(folder: Path, count: int, per_shard: int, n: int, tokens: int) -> dict[str, float]:
    """What it costs to publish shards, and to open those that no index names."""
    shards = Shards(str(folder / "published"), tables.SAMPLES, "prompt_id")
    shards.claim({})
    seconds = 0.0
    for number in range(count):
        names = [f"{number * per_shard + i:016x}" for i in range(per_shard)]
        rows = sample_rows(names, n, tokens)
        start = time.perf_counter()
        shards.publish(name_of(names), rows)
        seconds += time.perf_counter() - start
    size = sum(file.stat().st_size for file in (folder / "published").glob("*.parquet"))
    start = time.perf_counter()
    assert len(shards.done()) == count * per_shard
    return {
        "publish_seconds_a_shard": seconds / count,
        "bytes_a_sample": size / (count * per_shard * n),
        "open_seconds_a_shard": (time.perf_counter() - start) / count,
    }


def measure_rows(folder: Path, rows: int, tokens_in: int, tokens_out: int) -> dict[str, float]:
    """What a process pays to prepare prompts, to judge samples and to look rows up by id."""
    draw = np.random.default_rng(1)
    with (folder / "data.jsonl").open("w") as file:
        for i in range(rows):
            told = {"prompt": f"{i} {text(tokens_in, draw)}", "reference": "The answer is 42"}
            file.write(json.dumps(told) + "\n")
    tokeniser = Tokeniser(str(tiny_model("llama", folder / "model")))
    config = DataConfig(path=str(folder / "data.jsonl"), max_prompt_tokens=100 * tokens_in, limit=rows)
    out = folder / "prompts.parquet"
    start = time.perf_counter()
    prepare_prompts(config, tokeniser, out, folder / "drops.parquet", verify=VerifyConfig())
    prepared = time.perf_counter() - start
    # The tiny tokenizer makes more tokens of a text than a model's own: the ids are replaced by as many as asked.
    table = tables.PROMPTS.read(out).to_pylist()
    write_stream(tables.PROMPTS, (row | {"prompt_ids": ids(tokens_in, draw)} for row in table), out)
    questions = [("", f"{text(tokens_out, draw)} The answer is 42", "42") for _ in range(min(rows, 10_000))]
    start = time.perf_counter()
    verdicts_of(questions, VerifyConfig(kind="numeric"))
    judged = time.perf_counter() - start
    start = time.perf_counter()
    with Lookup(tables.PROMPTS, out, folder) as known:
        opened = time.perf_counter() - start
        start = time.perf_counter()
        assert sum(1 for _ in known.in_order()) == rows
        walked = time.perf_counter() - start
    return {
        "prompt_bytes_on_disk": out.stat().st_size / rows,
        "prepare_seconds_a_million_prompts": prepared * MILLION / rows,
        "judge_seconds_a_million_samples": judged * MILLION / len(questions),
        "lookup_open_seconds_a_million_rows": opened * MILLION / rows,
        "lookup_walk_seconds_a_million_rows": walked * MILLION / rows,
    }


def measure_job(folder: Path, batch: int, n: int, tokens_out: int) -> dict[str, float]:
    """A real job on `folder`/prompts.parquet whose engine answers at once."""
    start_local(num_cpus=(os.cpu_count() or 1) + 4)
    engine = EngineConfig(
        kind="transformers", dtype="float32", pool=EngineResources(batch_size=batch, threads=1)
    )
    work = Ready(Sampling(), n, 0, tokens=tokens_out)
    job = Job(folder / "prompts.parquet", str(folder / "model"), work, str(folder / "job"))
    cpu = time.process_time()
    with peak_of_object_store() as store:
        facts = run([job], engine)[0]
    cpu = time.process_time() - cpu
    ray.shutdown()
    shards = len(list((folder / "job").glob("*.parquet")))
    return {
        "shards": shards,
        "shards_a_second_one_actor": shards / facts["seconds"],
        "driver_cpu_seconds_a_shard": cpu / shards,
        "object_store_peak_bytes": store["bytes"],
    }


def cost(asked: argparse.Namespace, found: dict[str, float]) -> dict[str, float]:
    """The job's cost and the share of each limit that it uses."""
    samples = asked.prompts * asked.n
    per_shard = max(1, asked.batch // asked.n)
    shards = asked.prompts / per_shard
    seconds = samples * asked.tokens_out / (asked.gpus * asked.tokens_per_second)
    millions = asked.prompts / MILLION
    in_flight = asked.gpus * 2 * asked.batches_in_flight * per_shard * found["prompt_bytes_in_memory"]
    return {
        "hours": seconds / 3600,
        "gpu_hours": asked.gpus * seconds / 3600,
        "samples_terabytes": samples * found["bytes_a_sample"] / 1e12,
        "prompts_gigabytes": asked.prompts * found["prompt_bytes_on_disk"] / 1e9,
        "shards": shards,
        "shards_a_second": shards / seconds,
        "index_gigabytes": asked.prompts * found["index_bytes_a_prompt"] / 1e9,
        "batches_in_flight_megabytes": in_flight / 1e6,
        "driver_gigabytes": asked.prompts * found["driver_bytes_a_prompt"] / 1e9,
        "prepare_core_hours": millions * found["prepare_seconds_a_million_prompts"] / 3600,
        "judge_core_hours": millions * asked.n * found["judge_seconds_a_million_samples"] / 3600,
        "publish_share_of_an_actor": found["publish_seconds_a_shard"] * shards / (asked.gpus * seconds),
        "driver_share_of_a_core": found["driver_cpu_seconds_a_shard"] * shards / seconds,
        "resume_seconds": millions
        * (found["done_seconds_a_million_prompts"] + found["count_seconds_a_million_prompts"]),
        "resume_seconds_without_index": shards * found["open_seconds_a_shard"],
    }


def limits(asked: argparse.Namespace, cost: dict[str, float]) -> list[dict[str, Any]]:
    """What is used up, the fullest first; `times` is how often larger the job may be before it breaks there."""
    have = [
        ("driver, CPU of one core (more GPUs, smaller batches)", cost["driver_share_of_a_core"], 1.0),
        ("driver, memory in GB (more prompts)", cost["driver_gigabytes"], asked.driver_gigabytes),
        ("files in one folder (more prompts, smaller batches)", cost["shards"], asked.files),
        ("resume, seconds (more prompts)", cost["resume_seconds"], 0.02 * cost["hours"] * 3600),
        ("actor, share of its time to publish (smaller batches)", cost["publish_share_of_an_actor"], 1.0),
        (
            "object store, MB of batches under way (longer prompts)",
            cost["batches_in_flight_megabytes"],
            asked.object_store_gigabytes * 1e3,
        ),
    ]
    rows = [
        {"limit": name, "used": used, "there": there, "times": there / used} for name, used, there in have
    ]
    return sorted(rows, key=lambda row: row["times"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", required=True)
    parser.add_argument("--prompts", type=float, default=10e6)
    parser.add_argument("--n", type=int, default=10, help="samples a prompt")
    parser.add_argument("--gpus", type=int, default=64, help="engines of one GPU")
    parser.add_argument("--tokens-per-second", type=float, default=5586, help="out of one GPU")
    parser.add_argument("--tokens-in", type=int, default=128, help="of a prompt")
    parser.add_argument("--tokens-out", type=int, default=128, help="of a response")
    parser.add_argument("--batch", type=int, default=128, help="engine.pool.batch_size")
    parser.add_argument("--batches-in-flight", type=int, default=2, help="engine.pool.batches_in_flight")
    parser.add_argument("--driver-gigabytes", type=float, default=16, help="memory that the driver may take")
    parser.add_argument("--object-store-gigabytes", type=float, default=100, help="of all nodes together")
    parser.add_argument("--files", type=float, default=10e6, help="files that one folder takes")
    parser.add_argument("--measured-ids", type=int, default=MILLION)
    parser.add_argument("--measured-shards", type=int, default=500)
    parser.add_argument("--measured-rows", type=int, default=20_000)
    asked = parser.parse_args()
    quiet()
    per_shard = max(1, asked.batch // asked.n)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = measure_ids(folder, asked.measured_ids, per_shard)  # first: it tells memory by the peak
        found |= measure_shards(folder, asked.measured_shards, per_shard, asked.n, asked.tokens_out)
        found |= measure_rows(folder, asked.measured_rows, asked.tokens_in, asked.tokens_out)
        table = pq.read_table(folder / "prompts.parquet", columns=list(SampleWork.columns))
        found["prompt_bytes_in_memory"] = table.nbytes / len(table)
        found |= measure_job(folder, asked.batch, asked.n, asked.tokens_out)
    told = cost(asked, found)
    out = {"asked": vars(asked), "measured": found, "cost": told, "breaks_first": limits(asked, told)}
    Path(asked.json).write_text(json.dumps(out, indent=1))
    for title in ("measured", "cost"):
        print(f"\n{title}")
        for key, value in out[title].items():
            print(f"  {key:40} {value:14,.4g}")
    print("\nbreaks first")
    for row in out["breaks_first"]:
        print(f"  {row['limit']:56} {row['used']:10,.4g} of {row['there']:10,.4g}: {row['times']:,.3g} times")


if __name__ == "__main__":
    main()
