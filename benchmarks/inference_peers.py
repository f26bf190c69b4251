"""What sampling and scoring are measured against, each in a process of its own.

    python -m benchmarks.inference_peers KIND IN.json OUT.json

bare-sample, bare-score: `vllm.LLM` in one process, all requests in one call. batch-1: the paper's released way of
scoring (transformers, one row at a time, the head over every token). Times exclude start-up and a warm-up request.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from allo_ray.config.engine import EngineConfig
from allo_ray.engines.build import engine_environment

#: Wall seconds, CPU seconds of the process, and tokens generated or scored.
Figures = dict[str, float]


def run_peer(kind: str, config: EngineConfig, told: dict[str, Any]) -> Figures:
    """Runs a peer on what `told` describes and returns its figures."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "in.json", Path(folder) / "out.json"
        asked.write_text(json.dumps(told | {"config": config.model_dump(mode="json")}))
        command = [sys.executable, "-m", "benchmarks.inference_peers", kind, str(asked), str(answered)]
        environment = os.environ | engine_environment(config)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{kind}: {done.stderr[-2000:]}")
        return json.loads(answered.read_text())


def _llm(config: EngineConfig, model: str) -> Any:
    from vllm import LLM

    pool = config.pool
    return LLM(
        model=model,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        max_num_batched_tokens=max(pool.max_num_batched_tokens, config.max_model_len),
        max_num_seqs=pool.max_num_seqs,
        **({"gpu_memory_utilization": pool.gpu_memory_utilization} if pool.num_gpus else {}),
        # Seeded requests whose prompts are cut into chunks end vLLM 0.32 on the CPU.
        enable_chunked_prefill=pool.num_gpus > 0,
        enforce_eager=pool.num_gpus == 0,
        block_size=32 if pool.num_gpus == 0 else None,
        kv_cache_memory_bytes=int(pool.kv_cache_gib * 2**30) if pool.num_gpus == 0 else None,
        disable_log_stats=True,
    )


def bare_sample(config: EngineConfig, told: dict[str, Any]) -> Figures:
    from vllm import SamplingParams

    llm = _llm(config, told["model"])
    prompts = [{"prompt_token_ids": ids} for ids, _ in told["requests"]]
    params = [SamplingParams(seed=seed, **told["sampling"]) for _, seed in told["requests"]]
    llm.generate(prompts[:2], params[:2], use_tqdm=False)
    wall, cpu = time.perf_counter(), time.process_time()
    done = llm.generate(prompts, params, use_tqdm=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": wall, "cpu_seconds": cpu, "tokens": sum(len(one.outputs[0].token_ids) for one in done)}


def bare_score(config: EngineConfig, told: dict[str, Any]) -> Figures:
    from vllm import SamplingParams

    llm = _llm(config, told["model"])
    prompts = [{"prompt_token_ids": [*context, *response]} for context, response in told["requests"]]
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    llm.generate(prompts[:2], params, use_tqdm=False)
    wall, cpu = time.perf_counter(), time.process_time()
    for output in llm.generate(prompts, params, use_tqdm=False):
        told_logprobs: Any = output.prompt_logprobs
        [next(iter(position.values())).logprob for position in told_logprobs[1:]]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": wall, "cpu_seconds": cpu, "tokens": _tokens(told)}


def batch_1(config: EngineConfig, told: dict[str, Any]) -> Figures:
    import torch
    from transformers import AutoModelForCausalLM

    if config.pool.num_gpus == 0:
        torch.set_num_threads(config.pool.threads or max(1, int(config.pool.num_cpus)))
    device = "cuda" if config.pool.num_gpus else "cpu"
    loaded: Any = AutoModelForCausalLM.from_pretrained(told["model"], dtype=getattr(torch, config.dtype))
    model = loaded.to(device).eval()

    @torch.inference_mode()
    def score(context: list[int], response: list[int]) -> list[float]:
        ids = torch.tensor([[*context, *response]], device=device)
        probs = model(input_ids=ids).logits[0, :-1].softmax(-1)
        return probs.gather(-1, ids[0, 1:, None])[-len(response) :, 0].tolist()

    score(*told["requests"][0])
    wall, cpu = time.perf_counter(), time.process_time()
    for context, response in told["requests"]:
        score(context, response)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": wall, "cpu_seconds": cpu, "tokens": _tokens(told)}


def _tokens(told: dict[str, Any]) -> int:
    return sum(len(context) + len(response) for context, response in told["requests"])


def main() -> None:
    kind, asked, answered = sys.argv[1:]
    told = json.loads(Path(asked).read_text())
    config = EngineConfig.model_validate(told["config"])
    peers = {"bare-sample": bare_sample, "bare-score": bare_score, "batch-1": batch_1}
    Path(answered).write_text(json.dumps(peers[kind](config, told)))


if __name__ == "__main__":
    main()
