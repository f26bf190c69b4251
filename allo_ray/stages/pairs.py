"""Preference pairs: right x wrong among judged samples, or the user's own pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from allo_ray import tables
from allo_ray.config.data import DataConfig, PairConfig, VerifyConfig
from allo_ray.data.lookup import Lookup, stream, write_stream
from allo_ray.data.pairing import build_pairs
from allo_ray.data.prepare import prepare_pairs
from allo_ray.data.tokenise import Tokeniser
from allo_ray.data.verify import Verifier
from allo_ray.stages.base import Context, Stage, data_settings
from allo_ray.store import local_path


def run(ctx: Context) -> None:
    """Judges the samples and pairs them. Writes judged.parquet and pairs.parquet."""
    judged = ctx.out / "judged.parquet"
    write_stream(tables.SAMPLES, _judged(ctx), judged)
    ctx.facts["counts"] = build_pairs(
        ctx.file("prompts", "prompts.parquet"),
        judged,
        ctx.out / "pairs.parquet",
        config=PairConfig(**ctx.settings["pair"]),
        data=DataConfig(**ctx.settings["data"]),
        seed=ctx.settings["seed"],
        tokeniser=Tokeniser(str(local_path(ctx.model("model").base))),
    )


def read(ctx: Context) -> None:
    """Takes ready pairs in. Writes pairs.parquet and drops.parquet."""
    ctx.facts["counts"] = prepare_pairs(
        DataConfig(**data_settings(ctx.settings)),
        Tokeniser(str(local_path(ctx.model("model").base))),
        ctx.out / "pairs.parquet",
        ctx.out / "drops.parquet",
    )


def _judged(ctx: Context) -> Iterator[dict[str, Any]]:
    verifier = Verifier(VerifyConfig(**ctx.settings["verify"]))
    samples = ctx.file("samples", "samples")
    with Lookup(tables.PROMPTS, ctx.file("prompts", "prompts.parquet"), ctx.out / ".scratch") as prompts:
        for sample in stream(tables.SAMPLES, samples):
            [prompt] = prompts.take(prompts.find([sample["prompt_id"]]))
            answer, verdict = verifier.check(prompt["prompt"], sample["text"], prompt["answer"])
            yield {**sample, "answer": answer, "verdict": verdict}
    (ctx.out / ".scratch").rmdir()


PAIRS = Stage("pairs", 1, run)
READ_PAIRS = Stage("read_pairs", 1, read)
