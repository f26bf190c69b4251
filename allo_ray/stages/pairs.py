"""Preference pairs: right x wrong among judged samples, or the user's own pairs."""

from __future__ import annotations

from allo_ray.config.data import DataConfig, PairConfig, VerifyConfig
from allo_ray.data.pairing import build_pairs
from allo_ray.data.prepare import DROPPED_ROWS, prepare_pairs
from allo_ray.data.tokenise import Tokeniser
from allo_ray.data.verdicts import write_verdicts
from allo_ray.stages.base import Context, Stage, data_settings
from allo_ray.store import local_path

#: Counts of `build_pairs` that say what was removed.
DROPPED_SAMPLES = {
    "pairs_over_long": "pairs longer than data.max_tokens",
    "near_duplicates": "samples that another one of the prompt equals but for case, blanks and punctuation",
    "right_but_unfinished": "right samples cut off at sample.max_tokens",
    "empty": "empty samples",
}


def run(ctx: Context) -> None:
    """Judges the samples and pairs them. Writes judged.parquet, pairs.parquet and drops.parquet."""
    prompts, judged = ctx.file("prompts", "prompts.parquet"), ctx.out / "judged.parquet"
    verify = VerifyConfig(**ctx.settings["verify"])
    counts = write_verdicts(judged, prompts=prompts, samples=ctx.file("samples", "samples"), verify=verify)
    counts |= build_pairs(
        prompts,
        judged,
        ctx.out / "pairs.parquet",
        ctx.out / "drops.parquet",
        config=PairConfig(**ctx.settings["pair"]),
        data=DataConfig(**ctx.settings["data"]),
        seed=ctx.settings["seed"],
        tokeniser=Tokeniser(str(local_path(ctx.model("model").base))),
    )
    ctx.facts["counts"] = counts
    ctx.dropped(counts, DROPPED_SAMPLES)


def read(ctx: Context) -> None:
    """Takes ready pairs in. Writes pairs.parquet and drops.parquet."""
    ctx.facts["counts"] = counts = prepare_pairs(
        DataConfig(**data_settings(ctx.settings)),
        Tokeniser(str(local_path(ctx.model("model").base))),
        ctx.out / "pairs.parquet",
        ctx.out / "drops.parquet",
    )
    ctx.dropped(counts, DROPPED_ROWS)


PAIRS = Stage("pairs", 1, run)
READ_PAIRS = Stage("read_pairs", 1, read)
