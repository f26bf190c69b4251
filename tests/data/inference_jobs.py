"""What the tests of batch jobs ask of engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from allo_ray import tables
from allo_ray.config.engine import EngineConfig, EngineResources
from allo_ray.data.shards import Shards
from allo_ray.engines.base import Sampling

SAMPLING = Sampling(temperature=1.0, top_p=0.9, max_tokens=12)
#: Three batches of 64 requests where each prompt is sampled twice.
PROMPTS = 72


def engine(kind: str = "transformers", batch: int = 64, **pool: Any) -> EngineConfig:
    return EngineConfig(
        kind=kind,  # type: ignore[arg-type]
        dtype="float32",
        max_model_len=256,
        pool=EngineResources(
            kv_cache_gib=0.05, max_num_batched_tokens=256, max_num_seqs=16, batch_size=batch, **pool
        ),
    )


def prompts(count: int = PROMPTS, seed: int = 0) -> pa.Table:
    """Rows of PROMPTS with prompts of 1 to 99 tokens, and a context and a response to be scored in each."""
    draw = np.random.default_rng(seed)

    def ids(fewest: int, most: int) -> list[int]:
        return draw.integers(3, 300, size=draw.integers(fewest, most)).tolist()

    given = [(ids(1, 100), ids(1, 60), ids(0, 60)) for _ in range(count)]
    rows = tables.PROMPTS.build(
        {
            "id": f"p{i:03d}",
            "prompt": f"question {i}",
            "text": f"question {i}",
            "prompt_ids": prompt,
            "reference": None,
            "answer": str(i),
            "group": None,
        }
        for i, (prompt, _, _) in enumerate(given)
    )
    for place, name in enumerate(("context_ids", "response_ids"), start=1):
        rows = rows.append_column(name, pa.array([row[place] for row in given], pa.list_(pa.int32())))
    return rows


def samples(out: Path | str) -> list[dict[str, Any]]:
    """All rows of all shards, as anybody reads them, in the order of the prompts; none is there twice."""
    raw = tables.SAMPLES.read(out).sort_by([("prompt_id", "ascending"), ("index", "ascending")])
    assert len(raw) == len(Shards(str(out), tables.SAMPLES, "prompt_id").read())
    return raw.to_pylist()
