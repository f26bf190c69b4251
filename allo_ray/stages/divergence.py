"""How far a model has moved from the SFT model: KL(SFT || model) per response, in nats.

The mean over responses y ~ SFT of sum_t [log SFT(y_t) - log model(y_t)], on samples that the run has drawn already.
It needs no further sampling; it is unbiased, since the samples come from the first of the two distributions (the
other direction would need samples of every model); and all models are measured on the same responses, so that
differences between models are less noisy than each estimate. With one finite set of samples it may come out a little
below 0 where the divergence is small beside its standard error.

Samples drawn at temperature 1 and top_p 1 are the SFT model's own distribution. Drawn otherwise, the figure is the
mean of the same log-ratios over what was drawn: it compares models of one run, and is no KL divergence by the book.
A response cut by its token limit or a stop string counts as far as it goes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from allo_ray import tables


def rows_to_score(prompts: str | Path, samples: str | Path, most: int) -> pa.Table:
    """At most `most` samples with columns id, prompt_id, context_ids, response_ids.

    The first sample of every prompt comes before the second of any; prompts in the order of their ids, which are
    hashes. So the choice is random, and the same in every run.
    """
    drawn = pads.dataset(tables.SAMPLES.files(samples), schema=tables.SAMPLES.schema)
    order = [("index", "ascending"), ("prompt_id", "ascending")]
    names = drawn.to_table(["id", "prompt_id", "index"]).sort_by(order)["id"]
    chosen: dict[str, None] = {}  # a shard that was written twice holds an id twice
    for name in names:
        if len(chosen) == most:
            break
        chosen[name.as_py()] = None
    columns = ["id", "prompt_id", "response_ids"]
    rows = {row["id"]: row for row in drawn.to_table(columns, filter=_among("id", chosen)).to_pylist()}
    asked = pads.dataset(tables.PROMPTS.files(prompts), schema=tables.PROMPTS.schema)
    wanted = _among("id", dict.fromkeys(row["prompt_id"] for row in rows.values()))
    contexts = {
        row["id"]: row["prompt_ids"]
        for row in asked.to_table(["id", "prompt_ids"], filter=wanted).to_pylist()
    }
    return pa.Table.from_pylist(
        [{**rows[name], "context_ids": contexts[rows[name]["prompt_id"]]} for name in chosen],
        schema=_ROWS,
    )


def divergence(
    start: Mapping[str, float], model: Mapping[str, float], prompt_of: Mapping[str, str]
) -> dict[str, float | None]:
    """The estimate and its standard error from the log-probs (nats) of whole responses.

    Args:
        start, model: sample id -> log-prob under the SFT model and under the model; samples in both count.
        prompt_of: sample id -> prompt id. Samples of one prompt are alike, so the error counts prompts, not samples.

    Returns:
        mean and standard_error (None without samples, or with those of one prompt alone), n (samples).
    """
    ratios = {name: start[name] - model[name] for name in start if name in model}
    if not ratios:
        return {"mean": None, "standard_error": None, "n": 0}
    mean = math.fsum(ratios.values()) / len(ratios)
    sums: dict[str, float] = defaultdict(float)
    for name, ratio in ratios.items():
        sums[prompt_of[name]] += ratio - mean
    error = None
    if len(sums) > 1:
        squares = math.fsum(one * one for one in sums.values())
        error = math.sqrt(squares * len(sums) / (len(sums) - 1)) / len(ratios)
    return {"mean": mean, "standard_error": error, "n": len(ratios)}


def _among(column: str, names: Mapping[str, None]) -> pc.Expression:
    return pc.field(column).isin(pa.array(list(names), pa.string()))


_ROWS = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("prompt_id", pa.string()),
        pa.field("context_ids", pa.list_(pa.int32())),
        pa.field("response_ids", pa.list_(pa.int32())),
    ]
)
