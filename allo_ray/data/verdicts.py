"""Judges samples after they were drawn, so that another verifier samples nothing again.

The driver reads and writes; many samples are judged by Ray tasks, some thousand each, handed back in order. What is
under way is bounded by the CPUs, not by the number of samples.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from allo_ray import tables
from allo_ray.config.data import VerifyConfig
from allo_ray.data.lookup import BATCH_ROWS, Lookup, stream, write_stream
from allo_ray.data.ordered_tasks import in_order
from allo_ray.data.verify import Verifier

#: So many samples are judged sooner than a task has started.
ROWS_IN_PLACE = 8 * BATCH_ROWS

#: (prompt, response, gold answer), and (answer of the response, verdict).
Question = tuple[str, str, str | None]
Verdict = tuple[str | None, bool | None]


def write_verdicts(
    out: str | Path, *, prompts: str | Path, samples: str | Path, verify: VerifyConfig
) -> dict[str, int]:
    """Writes SAMPLES to the file `out` with answer and verdict; the rows keep their order.

    Returns:
        samples, right, wrong, unverified (no gold answer), no_answer (the response states none; wrong).

    Raises:
        UserError: the verifier cannot be loaded, or the user's own fails on a sample.
    """
    out = Path(out)
    facts: Counter[str] = Counter(samples=0, right=0, wrong=0, unverified=0, no_answer=0)

    def judged(known: Lookup) -> Iterator[dict[str, Any]]:
        for rows, verdicts in _judge(_questions(samples, known), verify):
            for row, (answer, verdict) in zip(rows, verdicts, strict=True):
                facts["samples"] += 1
                facts["unverified" if verdict is None else "right" if verdict else "wrong"] += 1
                facts["no_answer"] += answer is None
                yield row | {"answer": answer, "verdict": verdict}

    with Lookup(tables.PROMPTS, prompts, out.parent) as known:
        write_stream(tables.SAMPLES, judged(known), out)
    return dict(facts)


def _questions(samples: str | Path, known: Lookup) -> Iterator[tuple[list[dict[str, Any]], list[Question]]]:
    rows = stream(tables.SAMPLES, samples)
    while chunk := list(islice(rows, BATCH_ROWS)):
        names = list(dict.fromkeys(row["prompt_id"] for row in chunk))
        asked = dict(zip(names, known.take(known.find(names)), strict=True))
        prompts = [asked[row["prompt_id"]] for row in chunk]
        yield (
            chunk,
            [
                (prompt["prompt"], row["text"], prompt["answer"])
                for row, prompt in zip(chunk, prompts, strict=True)
            ],
        )


def _judge(
    chunks: Iterator[tuple[list[dict[str, Any]], list[Question]]], verify: VerifyConfig
) -> Iterator[tuple[list[dict[str, Any]], list[Verdict]]]:
    """The rows of all chunks in their order, each with its verdict."""
    for rows, questions in islice(chunks, ROWS_IN_PLACE // BATCH_ROWS):
        yield rows, verdicts_of(questions, verify)
    under_way: deque[list[dict[str, Any]]] = deque()

    def asked() -> Iterator[list[Question]]:
        for rows, questions in chunks:
            under_way.append(rows)
            yield questions

    for verdicts in in_order(partial(verdicts_of, verify=verify), asked()):
        yield under_way.popleft(), verdicts


def verdicts_of(questions: list[Question], verify: VerifyConfig) -> list[Verdict]:
    """Judges some responses."""
    verifier = Verifier(verify)
    return [verifier.check(*question) for question in questions]
