"""The rows that training reads, in the order in which it reads them.

The order of an epoch is a permutation that depends on the seed, the epoch and the ids alone: not on how the tables
are cut into files, nor on workers. Reference log-probs and token scores are joined by id, their lengths asserted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np

from allo_ray import tables
from allo_ray.data.lookup import Lookup, write_stream
from allo_ray.errors import UserError

CHUNK_ROWS = 1024


def epoch_order(ids: Lookup, epoch: int, seed: int) -> np.ndarray:
    """Row numbers [N] int64 of one epoch: a seeded permutation of the rows as sorted by id."""
    draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return ids.sorted_rows[draw.permutation(len(ids))]


def build_train_rows(
    out: str | Path,
    *,
    pairs: str | Path,
    logprobs: str | Path,
    scores: str | Path | None = None,
    epochs: int,
    seed: int,
    u: float | None = None,
    weight: Literal["threshold", "soft", "blame", "none"] = "none",
) -> dict[str, Any]:
    """Writes TRAIN_ROWS to the file `out` from PAIRS, the reference's LOGPROBS and, for forgetting, TOKEN_SCORES.

    Args:
        u, weight: "threshold" writes r = 1 where P_re < u, else 0 (Eq. 5); "soft" writes P_re itself, as the released
            code does; "blame" writes 1 - P_re; "none" leaves `rejected_weight` empty, which weights every token 1.

    Returns:
        rows, pairs, epochs; with scores also unscored (pairs left out, for want of a score), rejected_tokens,
        weighted_tokens (of one epoch) and kept (their share).

    Raises:
        UserError: no token is left to train on.
    """
    out = Path(out)
    assert weight == "none" or scores is not None, "weights come from token scores"
    assert weight != "threshold" or u is not None, "a threshold needs u"
    facts: dict[str, Any] = {"epochs": epochs}
    with ExitStack() as stack:
        rows = stack.enter_context(Lookup(tables.PAIRS, pairs, out.parent))
        references = stack.enter_context(Lookup(tables.LOGPROBS, logprobs, out.parent))
        scored = None
        if weight != "none" and scores is not None:
            scored = stack.enter_context(Lookup(tables.TOKEN_SCORES, scores, out.parent))
        assert rows.duplicates() == 0, "ids of pairs are unique"
        facts["pairs"] = len(rows)
        totals = {"rejected_tokens": 0, "weighted_tokens": 0}

        def ordered() -> Iterator[dict[str, Any]]:
            position = 0
            for epoch in range(epochs):
                order = epoch_order(rows, epoch, seed)
                for start in range(0, len(order), CHUNK_ROWS):
                    chunk = rows.take(order[start : start + CHUNK_ROWS])
                    for row in _joined(chunk, references, scored):
                        built = _row(row, position, u, weight)
                        if epoch == 0:
                            totals["rejected_tokens"] += len(row["rejected_ids"])
                            totals["weighted_tokens"] += sum(value > 0 for value in built["rejected_weight"])
                        position += 1
                        yield built

        facts["rows"] = write_stream(tables.TRAIN_ROWS, ordered(), out)
    facts["unscored"] = facts["pairs"] - facts["rows"] // max(1, epochs)
    if weight != "none":
        facts |= totals
        facts["kept"] = facts["weighted_tokens"] / max(1, facts["rejected_tokens"])
        if facts["weighted_tokens"] == 0 and weight != "blame":
            out.unlink()
            raise UserError(
                f"forget.u = {u}: none of the {facts['rejected_tokens']} tokens of the rejected responses has "
                "P_re < u, so there is nothing to forget. Raise forget.u, or check the reward model."
            )
    if facts["rows"] == 0:
        raise UserError(f"{pairs}: holds no pair to train on")
    return facts


def build_sequence_rows(out: str | Path, *, sequences: str | Path, epochs: int, seed: int) -> dict[str, Any]:
    """Writes TRAIN_ROWS to the file `out` from SEQUENCES, for supervised training: responses in `chosen_ids`.

    Returns:
        rows, sequences, epochs, response_tokens (of one epoch).
    """
    out = Path(out)
    with Lookup(tables.SEQUENCES, sequences, out.parent) as rows:
        assert rows.duplicates() == 0, "ids of sequences are unique"
        tokens = 0

        def ordered() -> Iterator[dict[str, Any]]:
            nonlocal tokens
            position = 0
            for epoch in range(epochs):
                order = epoch_order(rows, epoch, seed)
                for start in range(0, len(order), CHUNK_ROWS):
                    for row in rows.take(order[start : start + CHUNK_ROWS]):
                        tokens += len(row["response_ids"]) if epoch == 0 else 0
                        yield _EMPTY | {
                            "position": position,
                            "id": row["id"],
                            "prompt_ids": row["prompt_ids"],
                            "chosen_ids": row["response_ids"],
                        }
                        position += 1

        count = write_stream(tables.TRAIN_ROWS, ordered(), out)
        facts = {"rows": count, "sequences": len(rows), "epochs": epochs, "response_tokens": tokens}
    if count == 0:
        raise UserError(f"{sequences}: holds no row to train on")
    return facts


_EMPTY: dict[str, Any] = {
    name: [] for name in tables.TRAIN_ROWS.schema.names if name not in ("position", "id")
}


def _joined(
    chunk: list[dict[str, Any]], references: Lookup, scored: Lookup | None
) -> Iterator[dict[str, Any]]:
    """Pairs with their reference log-probs and P_re; pairs without a score are left out."""
    ids = [row["id"] for row in chunk]
    found = references.take(references.find(ids))
    p_re: list[Any] = [None] * len(chunk)
    if scored is not None:
        at = scored.find(ids)
        have = np.flatnonzero(at >= 0)
        for place, score in zip(have, scored.take(at[have]), strict=True):
            p_re[place] = score["p_re"]
    for row, reference, score in zip(chunk, found, p_re, strict=True):
        if scored is not None and score is None:
            continue
        for side in ("chosen", "rejected"):
            length, given = len(row[f"{side}_ids"]), len(reference[side])
            assert length == given, f"pair {row['id']}: {length} {side} tokens, {given} reference log-probs"
        if score is not None:
            length = len(row["rejected_ids"])
            assert length == len(score), (
                f"pair {row['id']}: {length} rejected tokens, {len(score)} token scores"
            )
        told = {"chosen_reference": reference["chosen"], "rejected_reference": reference["rejected"]}
        yield row | told | {"p_re": score}


def _row(row: dict[str, Any], position: int, u: float | None, weight: str) -> dict[str, Any]:
    weights: list[float] = []
    if weight == "soft":
        weights = row["p_re"]
    elif weight == "blame":
        weights = (1 - np.asarray(row["p_re"], np.float32)).clip(0).tolist()
    elif weight == "threshold":
        # P_re is stored in float32; so is u, or a probability equal to u would count as below it.
        weights = (np.asarray(row["p_re"], np.float32) < np.float32(u)).astype(np.float32).tolist()
    names = ("id", "prompt_ids", "chosen_ids", "rejected_ids", "chosen_reference", "rejected_reference")
    return {name: row[name] for name in names} | {"position": position, "rejected_weight": weights}
