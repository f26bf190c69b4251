"""Scoring: our job with either engine beside bare vLLM and the paper's released way, on the same cores, in turns.

    python -m benchmarks.score --json score.json [--rows 48] [--rounds 3] [--model FOLDER] [--gpu] [--engine ENGINE]

Three mixes of lengths: `short` (contexts of 40 to 80 tokens, responses of 8 to 40), `long` (200 to 400, 100 to 300)
and `mixed` (20 to 400, 5 to 300, log-uniform). Reported: tokens (context + response) a second of steady state, by
wall clock and by CPU time, and start-up. A ratio is the median over the rounds of ours to theirs in the same round,
on the mix where it is lowest: `vs_vllm` is our vLLM actor beside bare vLLM, `vs_batch_1` the default engine beside the
released way. `faster_engine` says which engine the default should be. With `--engine transformers` vLLM is left out,
and `vs_batch_1` is that engine's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from transformers import AutoTokenizer

from allo_ray.config.engine import EngineConfig, EngineResources
from allo_ray.data.inference import score
from allo_ray.models import smollm2
from benchmarks.inference_peers import run_peer

ENGINES = ("vllm", "transformers")
#: Tokens of contexts and of responses: shortest and longest.
MIXES = {
    "short": ((40, 80), (8, 40)),
    "long": ((200, 400), (100, 300)),
    "mixed": ((20, 400), (5, 300)),
}


def requests(mix: str, count: int, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """Random tokens: their values do not matter to the time."""
    draw = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        length = round(float(np.exp(draw.uniform(np.log(low), np.log(high)))))
        return draw.integers(10, vocabulary, size=length).tolist()

    contexts, responses = MIXES[mix]
    return [(ids(*contexts), ids(*responses)) for _ in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--engine", choices=ENGINES, help="only this one; both, and bare vLLM, by default")
    parser.add_argument(
        "--max-num-batched-tokens",
        type=int,
        help="2048 by default, 16384 on a GPU (short steps leave it idle)",
    )
    told = parser.parse_args()
    gpus, kinds = int(told.gpu), [told.engine] if told.engine else list(ENGINES)
    peers = {"vllm": "bare-score", "batch_1": "batch-1"} if "vllm" in kinds else {"batch_1": "batch-1"}
    ray.init(num_cpus=(os.cpu_count() or 1) + 4, num_gpus=gpus, include_dashboard=False, log_to_driver=False)
    steps: dict[str, Any] = dict(batch_size=512, max_num_seqs=512) if told.gpu else {}
    steps["max_num_batched_tokens"] = told.max_num_batched_tokens or (16384 if told.gpu else 2048)
    pool = EngineResources(kv_cache_gib=0.5, threads=1, num_gpus=gpus, **steps)
    dtype = EngineConfig(pool=pool).dtype
    figures: dict[str, dict[str, list[dict[str, Any]]]] = {mix: {} for mix in MIXES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = told.model or smollm2(folder / "model")
        vocabulary = len(AutoTokenizer.from_pretrained(model))
        for number in range(told.rounds):
            for mix in MIXES:
                asked = requests(mix, told.rows, vocabulary)
                ids = [f"{i:06d}" for i in range(len(asked))]
                columns = {
                    "context_ids": [one for one, _ in asked],
                    "response_ids": [one for _, one in asked],
                }
                rows = pa.table({"id": ids} | columns)
                for kind in kinds:
                    config = EngineConfig(kind=kind, max_model_len=1024, pool=pool)
                    facts = score(rows, str(model), config, str(folder / f"{mix}-{kind}-{number}"))
                    figures[mix].setdefault(f"ours_{kind}", []).append(facts | {"tokens": facts["tokens_in"]})
                config = EngineConfig(max_model_len=1024, pool=pool)
                for label, kind in peers.items():
                    done = run_peer(kind, config, {"model": str(model), "requests": asked})
                    figures[mix].setdefault(label, []).append(done)

    def speed(mix: str, who: str, seconds: str) -> float:
        return statistics.median(one["tokens"] / one[seconds] for one in figures[mix][who])

    def ratio(mix: str, who: str, peer: str, seconds: str) -> float:
        pairs = zip(figures[mix][who], figures[mix][peer], strict=True)
        return statistics.median((a["tokens"] / a[seconds]) / (b["tokens"] / b[seconds]) for a, b in pairs)

    default = told.engine or EngineConfig().kind

    def ratios(seconds: str) -> dict[str, float]:
        out = {
            f"{who}_vs_{peer}": min(ratio(mix, who, peer, seconds) for mix in MIXES)
            for who in (f"ours_{kind}" for kind in kinds)
            for peer in peers
        }
        headlines = {"vs_vllm": out["ours_vllm_vs_vllm"]} if "vllm" in kinds else {}
        return headlines | {"vs_batch_1": out[f"ours_{default}_vs_batch_1"]} | out

    def faster(mix: str) -> str:
        return max(kinds, key=lambda kind: speed(mix, f"ours_{kind}", "seconds"))

    out = {
        "model": f"SmolLM2-135M-Instruct {dtype}, one " + ("GPU" if told.gpu else "thread"),
        "rows": told.rows,
        "max_num_batched_tokens": pool.max_num_batched_tokens,
        "rounds": told.rounds,
        "tokens_per_second": {
            mix: {who: speed(mix, who, "seconds") for who in figures[mix]} for mix in MIXES
        },
        "tokens_per_cpu_second": {
            mix: {who: speed(mix, who, "cpu_seconds") for who in figures[mix]} for mix in MIXES
        },
        "startup_seconds": {
            kind: statistics.median(
                one["startup_seconds"] for mix in MIXES for one in figures[mix][f"ours_{kind}"]
            )
            for kind in kinds
        },
        "default_engine": default,
        "faster_engine": {mix: faster(mix) for mix in MIXES},
        "ratio": ratios("seconds"),
        "ratio_cpu_time": ratios("cpu_seconds"),
    }
    Path(told.json).write_text(json.dumps(out, indent=1))
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
