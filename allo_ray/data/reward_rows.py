"""What the token reward model reads: training sequences from rewrites, and every negative to be scored (Eq. 5).

P_re(y-_j | p, x, y+, y-_<j): the context is the instruction p with problem, correct solution and prediction; scored is
the prediction itself, as if it were written again without a correction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from allo_ray import tables
from allo_ray.data.align_tokens import carry_over
from allo_ray.data.lookup import BATCH_ROWS, Lookup, stream, write_stream
from allo_ray.data.ordered_tasks import in_order
from allo_ray.data.templates import rewrite_context
from allo_ray.data.tokenise import Tokeniser

_IDS = pa.list_(pa.int32())
#: Id of a response, its ids in the policy's tokens, P_re of its tokens in the reward model's.
Scored = tuple[str, list[int], list[float]]
#: Responses to be scored, each in its context.
SCORE_ROWS = tables.Table(
    "score_rows",
    pa.schema(
        [pa.field("id", pa.string()), pa.field("context_ids", _IDS), pa.field("response_ids", _IDS)],
        metadata={"allo_ray.table": "score_rows", "allo_ray.version": str(tables.VERSION)},
    ),
)


def context_of(pair: Mapping[str, Any]) -> str:
    """The reward model's and the teacher's context of a pair; where there is no reference, y+ is the solution."""
    return rewrite_context(pair["prompt"], pair["reference"] or pair["chosen"], pair["rejected"])


def write_score_rows(
    out: str | Path, *, pairs: str | Path, policy: Tokeniser, reward: Tokeniser
) -> dict[str, int]:
    """Writes SCORE_ROWS for all PAIRS; ids are the reward model's own where its tokenizer is another one."""
    same = reward.same_as(policy)

    def rows() -> Iterator[dict[str, Any]]:
        for pair in stream(tables.PAIRS, pairs):
            ids = pair["rejected_ids"]
            if not same:
                text = policy.text(ids)
                ids = reward.response(text, end=ids[-1:] == [policy.eos])
            yield {"id": pair["id"], "context_ids": reward.prompt(context_of(pair)), "response_ids": ids}

    return {"rows": write_stream(SCORE_ROWS, rows(), Path(out)), "other_tokenizer": int(not same)}


def write_token_scores(
    out: str | Path, *, pairs: str | Path, raw: str | Path, policy: Tokeniser, reward: Tokeniser
) -> dict[str, int]:
    """Writes TOKEN_SCORES of all PAIRS' rejected responses; see `write_carried_scores`."""
    rows = stream(tables.PAIRS, pairs, ["id", "rejected_ids"])
    responses = ((pair["id"], pair["rejected_ids"]) for pair in rows)
    return write_carried_scores(out, responses=responses, raw=raw, policy=policy, reward=reward)


def write_carried_scores(
    out: str | Path,
    *,
    responses: Iterable[tuple[str, list[int]]],
    raw: str | Path,
    policy: Tokeniser,
    reward: Tokeniser,
) -> dict[str, int]:
    """Writes TOKEN_SCORES on the policy's tokens from those on the reward model's; responses without a score count.

    Where both tokenizers are the same the scores only pass through, their lengths asserted.

    Args:
        responses: (id, the policy's own token ids).

    Returns:
        rows, unscored.
    """
    same = reward.same_as(policy)
    facts = {"rows": 0, "unscored": 0}
    out = Path(out)

    def found(scores: Lookup) -> Iterator[list[Scored]]:
        waiting = iter(responses)
        while chunk := list(islice(waiting, BATCH_ROWS)):
            at = scores.find([name for name, _ in chunk])
            facts["unscored"] += int((at < 0).sum())
            have = [one for one, row in zip(chunk, at, strict=True) if row >= 0]
            taken = zip(have, scores.take(at[at >= 0]), strict=True)
            yield [(name, ids, score["p_re"]) for (name, ids), score in taken]

    def rows(scores: Lookup) -> Iterator[dict[str, Any]]:
        carry = partial(_carried, None if same else (policy, reward))
        for chunk in in_order(carry, found(scores), here=same or len(scores) <= BATCH_ROWS):
            yield from chunk

    with Lookup(tables.TOKEN_SCORES, raw, out.parent) as scores:
        facts["rows"] = write_stream(tables.TOKEN_SCORES, rows(scores), out)
    return facts


def _carried(tokenisers: tuple[Tokeniser, Tokeniser] | None, scored: list[Scored]) -> list[dict[str, Any]]:
    """Rows of TOKEN_SCORES on the policy's tokens; `tokenisers`: the policy's and the reward model's if they differ."""
    out = []
    for name, ids, p_re in scored:
        told = p_re if tokenisers is None else carry_over(*tokenisers, ids, p_re).tolist()
        assert len(told) == len(ids), f"{name}: one score for each token"
        out.append({"id": name, "p_re": told})
    return out


def write_reward_sequences(
    out: str | Path, *, rewrites: str | Path, max_tokens: int, limit: int | None = None
) -> dict[str, int]:
    """Writes SEQUENCES that teach the reward model to correct: context, then rewrite. Equal ones count once.

    Returns:
        rows, repeated, over_long (longer than `max_tokens`), over_limit.
    """
    facts = {"rows": 0, "repeated": 0, "over_long": 0, "over_limit": 0}

    def rows() -> Iterator[dict[str, Any]]:
        seen: set[str] = set()
        for row in stream(tables.REWRITES, rewrites):
            key = tables.content_id(row["context"], row["rewrite"])
            if key in seen:
                facts["repeated"] += 1
                continue
            seen.add(key)
            if len(row["context_ids"]) + len(row["rewrite_ids"]) > max_tokens:
                facts["over_long"] += 1
            elif limit is not None and facts["rows"] >= limit:
                facts["over_limit"] += 1
            else:
                facts["rows"] += 1
                yield {"id": key, "prompt_ids": row["context_ids"], "response_ids": row["rewrite_ids"]}

    write_stream(tables.SEQUENCES, rows(), Path(out))
    return facts


def write_prompt_sequences(
    out: str | Path, *, prompts: str | Path, tokeniser: Tokeniser, max_tokens: int
) -> dict[str, int]:
    """Writes SEQUENCES for supervised training: a prompt, then its reference as the response, ended by EOS.

    Returns:
        rows, without_reference, over_long (longer than `max_tokens`).
    """
    facts = {"without_reference": 0, "over_long": 0}

    def rows() -> Iterator[dict[str, Any]]:
        for row in stream(tables.PROMPTS, prompts):
            if not row["reference"]:
                facts["without_reference"] += 1
                continue
            ids = tokeniser.response(row["reference"])
            if len(row["prompt_ids"]) + len(ids) > max_tokens:
                facts["over_long"] += 1
            else:
                yield {"id": row["id"], "prompt_ids": row["prompt_ids"], "response_ids": ids}

    return {"rows": write_stream(tables.SEQUENCES, rows(), Path(out)), **facts}
