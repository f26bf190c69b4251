"""A preference step: TRL's DPOTrainer, the same with precomputed reference, and ours, in one run on equal terms.

    python -m benchmarks.train_step --json FILE [--shape quickstart|long] [--model FOLDER] [--pairs 40] [--threads 1]
        [--dtype bfloat16|float32]

Each contender runs in a process of its own, one after the other, on the same pairs (texts for TRL, which brings its
tokenizer into the process; token ids for ours, as its workers read them), with as many threads and in one dtype (bf16;
float32 on a CPU without instructions for bf16), micro-batches of 8 pairs, an optimizer step after each, no gradient
checkpointing, sigmoid DPO with beta 0.1. Ours trains a random 10 % of the neurons, TRL all of them (it has no other
way). The first step is left out of the medians.

Shapes: "quickstart" has that run's pairs (prompts of about 15 tokens, responses of about 4); "long" has prompts of
about 75 and responses of about 50 tokens, which differ from their second token on.

The JSON holds for each contender: median step seconds, CPU seconds of the median step (which neighbours on the machine
disturb less), tokens a second (prompt and response of both sequences, without padding, the same count for all), peak
RSS in bytes, and the loss of step 1; for ours also the arithmetic of the matrix products, the machine's rate at them,
and the share of the step that they take at that rate; and `ratio`, by wall time and (`cpu_...`) by CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from allo_ray.config.base import Dtype, cpu_dtype
from allo_ray.session import quiet

BATCH, BETA, SHARE = 8, 0.1, 0.1
CONTENDERS = ("trl", "trl_precompute", "ours")


def make_pairs(shape: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """Sums and differences with a right and a wrong answer."""
    drawn = random.Random(seed)

    def expression() -> tuple[str, int, str]:
        a, b, c = drawn.randint(10, 60), drawn.randint(2, 40), drawn.randint(1, 9)
        return f"{a} + {b} - {c}", a + b - c, f"{a} + {b} = {a + b}, {a + b} - {c} = {a + b - c}"

    pairs = []
    for _ in range(count):
        if shape == "quickstart":
            question, right, _ = expression()
            wrong = right + drawn.choice([-10, -2, -1, 1, 2, 10])
            prompt = f"Question: {question}\nAnswer: The answer is"
            pairs.append({"prompt": prompt, "chosen": f" {right}", "rejected": f" {wrong}"})
            continue
        parts = [expression() for _ in range(drawn.choice([5, 6, 6, 7]))]
        asked = "; ".join(question for question, _, _ in parts)
        worked = [working for _, _, working in parts[: drawn.choice([2, 2, 3])]]
        others = [expression()[2] for _ in range(drawn.choice([2, 2, 3]))]
        pairs.append(
            {
                "prompt": f"Question: {asked}. Work out the first ones.\nAnswer:",
                "chosen": f" {'. '.join(worked)}.",
                "rejected": f" Well: {'. '.join(others)}.",
            }
        )
    return pairs


class Clock:
    """Wall and CPU seconds of each step."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float]] = []
        self._began = (0.0, 0.0)

    def begin(self) -> None:
        self._began = (time.perf_counter(), time.process_time())

    def end(self) -> None:
        wall, cpu = self._began
        self.steps.append((time.perf_counter() - wall, time.process_time() - cpu))


def run_trl(model: str, dtype: str, pairs: list[dict[str, str]], precompute: bool, clock: Clock) -> float:
    """DPOTrainer with its defaults but for checkpointing, on the CPU; returns the loss of step 1."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Timed(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)),
            args=DPOConfig(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                learning_rate=1e-5,
                beta=BETA,
                num_train_epochs=1,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                bf16=dtype == "bfloat16",
                gradient_checkpointing=False,
                precompute_ref_log_probs=precompute,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(pairs),
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[Timed()],
        )
        trainer.train()
        return float(next(row["loss"] for row in trainer.state.log_history if "loss" in row))


def run_ours(model: str, dtype: Dtype, rows: list[Any], clock: Clock) -> tuple[float, dict[str, float]]:
    """The loop of `allo_ray.train` on plain torch; returns the loss of step 1 and the matrix arithmetic."""
    from dataclasses import replace

    import torch

    from allo_ray.config.train import TrainConfig
    from allo_ray.neurons.parametrize import attach
    from allo_ray.neurons.selection import Selection
    from allo_ray.train.checkpoint import Progress
    from allo_ray.train.forward import Policy, load_model
    from allo_ray.train.logprobs import logprobs_of
    from allo_ray.train.loop import Plan, run
    from allo_ray.train.updater import PlainUpdater

    loaded = load_model(model, getattr(torch, dtype))
    policy, whole = Policy(loaded), 1 << 20
    for first in range(0, len(rows), BATCH):
        batch = rows[first : first + BATCH]
        found, _ = logprobs_of(policy, batch, whole, torch.device("cpu"))
        rows[first : first + BATCH] = [
            replace(row, chosen_reference=chosen, rejected_reference=rejected)
            for row, (chosen, rejected) in zip(batch, found, strict=True)
        ]
    neurons = attach(loaded, random_selection(Selection.of_model(loaded)))
    config = TrainConfig(lr=1e-5, batch_size=BATCH, dtype=dtype)
    updater = PlainUpdater(policy, neurons, config)
    batches = [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]
    plan = Plan("dpo", {"beta": BETA}, config, len(batches), whole)
    progress = Progress()
    for batch in batches:
        clock.begin()
        run(updater, plan, [batch], progress)
        clock.end()
    return progress.metrics[0]["loss"], arithmetic(loaded, batches[1])


def token_rows(tokenizer: Any, pairs: list[dict[str, str]]) -> list[Any]:
    """Pairs as rows without references; responses end in the end-of-sequence token, as TRL's do."""
    import numpy as np

    from allo_ray.train.rows import Row

    none = np.zeros(0, dtype=np.float32)

    def ids(text: str, end: list[int]) -> np.ndarray:
        return np.array(tokenizer(text, add_special_tokens=False)["input_ids"] + end, dtype=np.int32)

    end = [tokenizer.eos_token_id]
    return [
        Row(
            at,
            str(at),
            ids(pair["prompt"], []),
            ids(pair["chosen"], end),
            ids(pair["rejected"], end),
            none,
            none,
            none,
        )
        for at, pair in enumerate(pairs)
    ]


def random_selection(dense: Any, share: float = SHARE) -> Any:
    """A random share of every tensor."""
    from dataclasses import replace

    import torch

    generator = torch.Generator().manual_seed(0)
    indices = {}
    for name in dense.names:
        drawn = torch.randint(
            round(1 / share), (dense.size_of(name),), dtype=torch.uint8, generator=generator
        )
        indices[name] = (drawn == 0).nonzero()[:, 0].int()
    return replace(dense, indices=indices, dense=False, k=share, order="random")


def arithmetic(model: Any, batch: list[Any]) -> dict[str, float]:
    """Operations of one step's matrix products, and the rate of a bare product of the model's shape.

    A weight of n neurons takes 2n operations a token forward and 4n backward; the head the same on the states that
    predict.
    """
    import torch

    from allo_ray.train.batching import pack

    packed = pack(batch, "pair")
    head = model.get_output_embeddings().weight.numel()
    body = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    )
    operations = 6 * (body * len(packed.tokens) + head * len(packed.states))
    hidden = model.config.hidden_size
    dtype = model.get_output_embeddings().weight.dtype
    left, right = (torch.randn(rows, hidden).to(dtype) for rows in (len(packed.tokens), 4 * hidden))
    seconds = []
    for _ in range(20):
        began = time.process_time()
        torch.nn.functional.linear(left, right)
        seconds.append(time.process_time() - began)
    rate = 2 * len(packed.tokens) * 4 * hidden * hidden / min(seconds)
    return {"operations": operations, "matrix_rate": rate, "matrix_seconds": operations / rate}


def contend(name: str, model: str, dtype: Dtype, folder: Path, threads: int) -> dict[str, Any]:
    """Runs one contender in this process, on what `compare` left in the folder."""
    import torch

    from allo_ray.train.process import peak_rss, prepare_process

    extra: dict[str, float] = {}
    clock = Clock()
    if name == "ours":
        prepare_process(threads, gpu=False)
        loss, extra = run_ours(model, dtype, pickle.loads((folder / "rows").read_bytes()), clock)
    else:
        torch.set_num_threads(threads)
        pairs = json.loads((folder / "pairs").read_text())
        loss = run_trl(model, dtype, pairs, name == "trl_precompute", clock)
    measured = clock.steps[1:]
    wall = statistics.median(step[0] for step in measured)
    cpu = statistics.median(step[1] for step in measured)
    if extra:
        extra["matrix_share"] = extra["matrix_seconds"] / cpu
    return {
        "step_seconds": wall,
        "step_cpu_seconds": cpu,
        "peak_rss": peak_rss(),
        "first_loss": loss,
        **extra,
    }


def in_own_process(name: str, model: str, dtype: Dtype, folder: Path, threads: int) -> dict[str, Any]:
    """Starts this module again for one contender."""
    target = folder / f"{name}.json"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.train_step",
        "--contender",
        name,
        str(folder),
    ]
    command += ["--json", str(target), "--model", model, "--threads", str(threads), "--dtype", dtype]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
    return json.loads(target.read_text())


def compare(model: str, dtype: Dtype, shape: str, count: int, threads: int, folder: Path) -> dict[str, Any]:
    """All contenders and their ratios."""
    from transformers import AutoTokenizer

    pairs = make_pairs(shape, count)
    rows = token_rows(AutoTokenizer.from_pretrained(model), pairs)
    (folder / "pairs").write_text(json.dumps(pairs))
    (folder / "rows").write_bytes(pickle.dumps(rows))
    tokens = sum(2 * len(row.prompt) + len(row.chosen) + len(row.rejected) for row in rows) * BATCH / count
    told: dict[str, Any] = {
        "shape": shape,
        "pairs": count,
        "threads": threads,
        "dtype": dtype,
        "tokens_of_prompt": statistics.mean(len(row.prompt) for row in rows),
        "tokens_of_response": statistics.mean(len(ids) for row in rows for ids in (row.chosen, row.rejected)),
    }
    for name in CONTENDERS:
        told[name] = in_own_process(name, model, dtype, folder, threads)
        told[name]["tokens_per_second"] = tokens / told[name]["step_seconds"]
        print(name, json.dumps(told[name]), flush=True)
    ratio: Callable[[str, str], float] = lambda name, key: told[name][key] / told["ours"][key]  # noqa: E731
    told["ratio"] = {
        "speed_vs_trl": ratio("trl", "step_seconds"),
        "speed_vs_trl_precompute": ratio("trl_precompute", "step_seconds"),
        "rss_vs_trl": 1 / ratio("trl", "peak_rss"),
        "cpu_speed_vs_trl": ratio("trl", "step_cpu_seconds"),
        "cpu_speed_vs_trl_precompute": ratio("trl_precompute", "step_cpu_seconds"),
    }
    return told


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", required=True)
    parser.add_argument(
        "--model", help="folder of the model; SmolLM2-135M-Instruct from its package by default"
    )
    parser.add_argument("--shape", choices=("quickstart", "long"), default="quickstart")
    parser.add_argument("--pairs", type=int, default=40, help="at least 16; 8 a step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=cpu_dtype())
    parser.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as made:
        folder, model = Path(made), asked.model
        if model is None:
            from allo_ray.models import smollm2

            model = str(smollm2(folder / "model"))
        if asked.contender:
            name, given = asked.contender
            found = contend(name, model, asked.dtype, Path(given), asked.threads)
        else:
            found = compare(model, asked.dtype, asked.shape, asked.pairs, asked.threads, folder)
    Path(asked.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
