"""The evaluate stage on real engines: one pool answers questions and scores samples, for every model."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from allo_ray import tables
from allo_ray.config.load import load
from allo_ray.config.run import RunConfig
from allo_ray.data.shards import Shards
from allo_ray.models import tiny_model
from allo_ray.pipeline import Done, Node, run
from allo_ray.report.terminal import Progress
from allo_ray.stages.base import Context, Stage
from allo_ray.stages.evaluate import EVALUATE
from allo_ray.stages.sample import SAMPLE
from allo_ray.store import Store, local_path

PROMPTS, SAMPLES = 64, 4


def _given_model(ctx: Context) -> None:
    ctx.hand_on(ctx.settings["folder"], None, ())


def _given_prompts(ctx: Context) -> None:
    draw = np.random.default_rng(0)
    rows = [
        {
            "id": tables.content_id(i),
            "prompt": f"question {i}",
            "text": f"question {i}",
            "prompt_ids": draw.integers(3, 300, size=draw.integers(2, 20)).tolist(),
            "reference": None,
            "answer": None,
            "group": None,
        }
        for i in range(PROMPTS)
    ]
    tables.PROMPTS.write(rows, ctx.out / "prompts.parquet")


GIVEN_MODEL, GIVEN_PROMPTS = Stage("given_model", 1, _given_model), Stage("given_prompts", 1, _given_prompts)


def evaluated(config: RunConfig, store: Store, **folders: Path) -> dict[str, Done]:
    """Samples single tokens from the first model and evaluates all of them."""
    engine = {"engine": {"kind": config.engine.kind, "dtype": config.engine.dtype}}
    assert config.sample is not None
    evaluate = config.evaluate.model_dump(mode="json")
    nodes = [
        Node("prompts", GIVEN_PROMPTS, {}, {}),
        *(
            Node(label, GIVEN_MODEL, {"folder": str(folder), "label": label}, {})
            for label, folder in folders.items()
        ),
        Node(
            "sample",
            SAMPLE,
            {"sample": config.sample.model_dump(), "seed": 5, **engine},
            {"model": next(iter(folders)), "prompts": "prompts"},
        ),
        Node(
            "evaluate",
            EVALUATE,
            {"evaluate": evaluate, "verify": config.verify.model_dump(), **engine},
            {
                **{f"model {label}": label for label in folders},
                "prompts": "prompts",
                "samples": "sample",
            },
        ),
    ]
    return run(config, nodes, store, Progress(Console(file=io.StringIO())))


@torch.inference_mode()
def logits(folder: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    """Log-probs [V] of the first token after each prompt, in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return [model(torch.tensor([ids])).logits[0, -1].log_softmax(-1) for ids in prompts]


def test_the_divergence_of_one_token_responses_is_the_exact_one(
    ray_cluster: None, tiny_qwen: Path, tmp_path: Path
) -> None:
    """For one-token responses KL(SFT || model) is a sum over the vocabulary, here by transformers.

    256 samples estimate it within four of their standard errors; and the estimate is that of the same samples' log-
    ratios by transformers, within the engines' float32 tolerance.
    """
    other = tiny_model("qwen", tmp_path / "other", seed=1)
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] *= 8  # two random models are nearly uniform, so nearly alike
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    config = load(
        "smoke",
        [
            "engine.dtype=float32",
            "engine.max_model_len=64",
            "engine.pool={kv_cache_gib: 0.05, max_num_batched_tokens: 256, max_num_seqs: 16}",
            f"sample={{n: {SAMPLES}, temperature: 1, top_p: 1, max_tokens: 1}}",
            f"evaluate.kl_samples={PROMPTS * SAMPLES}",
            "evaluate.suites=[{name: transfer, limit: 3}]",
        ],
    )
    store = Store(str(tmp_path / "store"))
    done = evaluated(config, store, SFT=tiny_qwen, copy=tiny_qwen, moved=other)
    facts = done["evaluate"].artifact.facts
    told = facts["kl"]
    assert facts["counts"] == {"transfer": 3}
    assert len(tables.EVALS.read(local_path(done["evaluate"].artifact.file("evals/moved.parquet")))) == 3
    assert told["SFT"] == {"mean": 0.0, "standard_error": 0.0, "n": PROMPTS * SAMPLES}
    assert told["copy"]["mean"] == pytest.approx(0, abs=1e-4)

    asked = tables.PROMPTS.read(local_path(done["prompts"].artifact.file("prompts.parquet")))
    prompts = dict(zip(asked["id"].to_pylist(), asked["prompt_ids"].to_pylist(), strict=True))
    start, moved = (
        dict(zip(prompts, logits(folder, list(prompts.values())), strict=True))
        for folder in (tiny_qwen, other)
    )
    samples = Shards(done["sample"].artifact.file("samples"), tables.SAMPLES, "prompt_id").read().to_pylist()
    ratios = [
        (start[row["prompt_id"]] - moved[row["prompt_id"]])[row["response_ids"][0]].item() for row in samples
    ]
    assert told["moved"]["mean"] == pytest.approx(np.mean(ratios), abs=1e-3)
    exact = math.fsum(
        (start[name].exp() * (start[name] - moved[name])).sum().item() for name in prompts
    ) / len(prompts)
    assert exact > 0.1, "the two models are too much alike to tell"
    assert abs(told["moved"]["mean"] - exact) < 4 * told["moved"]["standard_error"]

    again = evaluated(config, store, SFT=tiny_qwen, moved=other)["evaluate"]
    assert not again.cached
    assert again.artifact.facts["kl"]["moved"] == told["moved"]
    assert again.artifact.seconds < 20, (
        "answers and log-probs of known models are found, and no engine starts"
    )
