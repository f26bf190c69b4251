"""Fixture: a made-up but plausible finished run, and the parts it is made of."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from allo_ray import tables
from allo_ray.report.content import Comparison, ModelScores, Negative, ReportData, StageTime

SUITES = ("two-digit sums", "one-digit products")
MODELS = {"SFT": (176, 301), "DPO": (228, 297), "forgotten": (172, 300), "ALLO": (245, 303)}


def metrics(
    steps: int, paired: bool = True, rejected: bool = False, kept: float | None = None, seed: int = 0
) -> pa.Table:
    """A METRICS table of falling loss; the columns that a method does not have are null."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(steps):
        done = step / max(1, steps - 1)
        noise = rng.normal(0, 0.03) if step else 0.0
        row: dict[str, Any] = dict.fromkeys(tables.METRICS.schema.names)
        row |= {"step": step + 1, "lr": 1e-5, "grad_norm": 2.0 + noise}
        row |= {"tokens": 1843, "seconds": 2.1, "tokens_per_second": 1843 / 2.1, "peak_rss": 2_100_000_000}
        if paired:
            row |= {
                "loss": 0.693147 - 0.33 * done + noise,
                "chosen_logratio": 1.5 * done + noise,
                "rejected_logratio": -6.0 * done + noise,
                "margin": 0.75 * done + noise,
                "accuracy": 0.5 + 0.4 * done + noise if step else 0.5,
            }
        elif rejected:
            row |= {"loss": 0.693147 - 0.2 * done + noise, "rejected_logratio": -3.0 * done + noise}
        else:
            row["loss"] = 2.4 - 1.6 * done + noise
        if kept is not None:
            row["kept"] = kept + noise / 3 if rejected else 1 - (1 - kept) * min(1.0, 4 * done)
        rows.append(row)
    return tables.METRICS.build(rows)


def selection(k: float, layers: int = 30, seed: int = 0) -> dict[str, tuple[int, int]]:
    """Tensor name -> (selected, total) of a Llama with tied embeddings; `k` is about the share of each tensor."""
    rng = np.random.default_rng(seed)
    sizes = {
        "self_attn.q_proj": 331776,
        "self_attn.k_proj": 110592,
        "self_attn.v_proj": 110592,
        "self_attn.o_proj": 331776,
        "mlp.gate_proj": 884736,
        "mlp.up_proj": 884736,
        "mlp.down_proj": 884736,
        "input_layernorm": 576,
        "post_attention_layernorm": 576,
    }
    out = {"model.embed_tokens.weight": (int(28311552 * k * 0.2), 28311552)}
    for layer in range(layers):
        for place, (module, total) in enumerate(sizes.items()):
            share = k * (0.5 + layer / layers) * (1 + 0.12 * (place % 4)) * rng.uniform(0.85, 1.15)
            out[f"model.layers.{layer}.{module}.weight"] = min(total, int(total * share)), total
    out["model.norm.weight"] = 101, 576
    return out


def negatives(n: int = 20, seed: int = 1) -> list[Negative]:
    """Wrong sums with working, scored so that the wrong digits have a low P_re."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        a, b = (int(x) for x in rng.integers(11, 89, 2))
        wrong = a + b + int(rng.choice([-10, -1, 1, 10, 9]))
        tokens = [" ", *str(a), " +", " ", *str(b), " =", " ", *str(wrong), "."]
        tokens += [" The", " answer", " is", " ", *str(wrong)]
        right = f" {a} + {b} = {a + b}. The answer is {a + b}"
        bad = "".join(tokens).find(str(wrong))
        p_re, at = [], 0
        for token in tokens:
            digit = token.isdigit() and at >= bad
            p_re.append(float(rng.uniform(0.02, 0.9) if digit else min(1.0, rng.beta(40, 1))))
            at += len(token)
        order = np.argsort(p_re)[::-1]
        q = np.ones(len(tokens))
        q[order[: int(0.2 * len(tokens))]] = 0
        made.append(Negative(f"What is {a} + {b}?", str(a + b), right, right, tokens, p_re, list(q)))
    return made


@pytest.fixture
def build_run() -> Callable[..., ReportData]:
    return run


@pytest.fixture
def build_metrics() -> Callable[..., pa.Table]:
    return metrics


def run(**changes: Any) -> ReportData:
    """The whole run; `changes` replace fields."""
    scores = []
    for suite, n in zip(SUITES, (400, 400), strict=True):
        for label, correct in MODELS.items():
            share = correct[SUITES.index(suite)] / n
            half = 1.96 * (share * (1 - share) / n) ** 0.5
            scores.append(
                ModelScores(label, suite, correct[SUITES.index(suite)], n, share - half, share + half)
            )
    p_re = np.concatenate(
        [np.random.default_rng(3).beta(30, 1, 9000), np.random.default_rng(4).beta(1, 4, 1100)]
    )
    fields: dict[str, Any] = {
        "name": "quickstart",
        "created": datetime(2026, 11, 24, 9, 30),
        "model": "SmolLM2-135M-Instruct, 134,515,008 neurons",
        "config": {"name": "quickstart", "forget": {"k": 0.05, "u": 0.95}, "learn": {"k": 0.1, "v": 0.2}},
        "models": scores,
        "comparisons": [
            Comparison("ALLO", "SFT", SUITES[0], 0.1725, 0.00031),
            Comparison("ALLO", "DPO", SUITES[0], 0.0425, 0.112),
            Comparison("DPO", "SFT", SUITES[0], 0.13, 0.0000004),
            Comparison("ALLO", "SFT", SUITES[1], 0.005, 0.86),
        ],
        "curves": {
            "sft": metrics(31, paired=False),
            "warmup": metrics(24, seed=5),
            "reward": metrics(16, paired=False, seed=6),
            "forget": metrics(24, paired=False, rejected=True, kept=0.306, seed=7),
            "learn": metrics(24, kept=0.803, seed=8),
        },
        "selections": {"k1": selection(0.05), "k2": selection(0.1, seed=9)},
        "p_re": p_re,
        "u": 0.95,
        "kept_by_u": float((p_re < 0.95).mean()),
        "v": 0.2,
        "negatives": negatives(),
        "stages": [
            StageTime("model", 0.4, 0.0, cached=True),
            StageTime("sft", 96, 18),
            StageTime("sample", 141, 34),
            StageTime("pair", 3.2, 1.1),
            StageTime("reference", 44, 12),
            StageTime("warmup", 131, 19),
            StageTime("locate", 6.5, 0.4),
            StageTime("rewrite", 1.2, 0.2),
            StageTime("reward", 58, 17),
            StageTime("score", 31, 15),
            StageTime("forget", 73, 18),
            StageTime("learn", 118, 19),
            StageTime("evaluate", 88, 26),
        ],
        "counts": {
            "prompts": 480,
            "samples": 3840,
            "right samples": 1622,
            "pairs": 743,
            "scored tokens": 10100,
        },
        "drops": {"longer than the context": 3, "all samples wrong": 61, "all samples right": 104},
        "versions": {"allo_ray": "0.1.0", "torch": "2.13.0+cpu", "ray": "2.60.0"},
    }
    return ReportData(**(fields | changes))
