"""Judges samples after they were drawn, so that another verifier samples nothing again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from allo_ray import tables
from allo_ray.config.data import VerifyConfig
from allo_ray.data.lookup import BATCH_ROWS, Lookup, stream, write_stream
from allo_ray.data.verify import Verifier


def write_verdicts(
    out: str | Path, *, prompts: str | Path, samples: str | Path, verify: VerifyConfig
) -> dict[str, int]:
    """Writes SAMPLES to the file `out` with answer and verdict; the rows keep their order.

    Returns:
        samples, right, wrong, unverified (no gold answer), no_answer (the response states none; wrong).
    """
    out = Path(out)
    verifier = Verifier(verify)
    facts: Counter[str] = Counter(samples=0, right=0, wrong=0, unverified=0, no_answer=0)

    def judged(known: Lookup) -> Iterator[dict[str, Any]]:
        rows = stream(tables.SAMPLES, samples)
        while chunk := list(islice(rows, BATCH_ROWS)):
            asked = known.take(known.find([row["prompt_id"] for row in chunk]))
            for row, prompt in zip(chunk, asked, strict=True):
                answer, verdict = verifier.check(prompt["prompt"], row["text"], prompt["answer"])
                facts["samples"] += 1
                facts["unverified" if verdict is None else "right" if verdict else "wrong"] += 1
                facts["no_answer"] += answer is None
                yield row | {"answer": answer, "verdict": verdict}

    with Lookup(tables.PROMPTS, prompts, out.parent) as known:
        write_stream(tables.SAMPLES, judged(known), out)
    return dict(facts)
