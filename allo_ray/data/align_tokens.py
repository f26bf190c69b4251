"""P_re of a reward model with another tokenizer, carried over to the policy's tokens by characters.

Legend: R tokens of the response in the policy's tokenizer, S in the reward model's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from allo_ray.data.tokenise import Tokeniser

Ranges = Sequence[tuple[int, int]]


def align(policy: Ranges, reward: Ranges, p_re: Sequence[float] | np.ndarray) -> np.ndarray:
    """Returns P_re [R] float32 of the policy's tokens: the minimum over the reward tokens that overlap each.

    Args:
        policy: character ranges [start, end) of the policy's tokens.
        reward: those of the reward model's tokens; neither starts nor ends go back.
        p_re: P_re [S] of the reward model's tokens.

    A token without characters (an end token) takes the reward tokens without characters at its place. A policy token
    that no reward token overlaps gets 1: nothing speaks against it.
    """
    scores = np.asarray(p_re, dtype=np.float32)
    assert len(scores) == len(reward), "one score for each reward token"
    out = np.ones(len(policy), dtype=np.float32)
    if not len(scores):
        return out
    starts, ends = np.asarray(reward, dtype=np.int64).T
    for place, (start, end) in enumerate(policy):
        if start == end:
            overlapping = scores[(starts == start) & (ends == start)]
        else:
            overlapping = scores[np.searchsorted(ends, start, "right") : np.searchsorted(starts, end, "left")]
        if len(overlapping):
            out[place] = overlapping.min()
    return out


def ranges(tokeniser: Tokeniser, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """The text of a response's own ids, and the characters that each of them stands for.

    Sampled ids need not be those that the tokenizer would choose for their text; then each range is found by decoding
    one token more. A character spread over several tokens belongs to all of them. Special tokens have no characters.
    """
    text = tokeniser.text(list(ids))
    body = list(ids)
    while body and body[-1] == tokeniser.eos:
        body.pop()
    end = [(len(text), len(text))] * (len(ids) - len(body))
    if tokeniser.plain(text) == body:
        return text, tokeniser.offsets(text) + end
    out, done = [], 0
    for count, token in enumerate(body, start=1):
        reached = len(tokeniser.text(body[:count]).rstrip("\ufffd"))
        if tokeniser.is_special(token):
            out.append((done, done))
            continue
        out.append((done, min(len(text), max(reached, done + 1))))
        done = max(done, reached)
    return text, out + end


def carry_over(
    policy: Tokeniser, reward: Tokeniser, policy_ids: Sequence[int], p_re: Sequence[float]
) -> np.ndarray:
    """P_re [R] of a response's policy ids, from the P_re [S] of `reward.response(text of these ids)`."""
    text, own = ranges(policy, policy_ids)
    theirs = [*reward.offsets(text), (len(text), len(text))]
    if len(theirs) == len(p_re) + 1:  # the text ended in EOS already, or the response never ended
        theirs = theirs[:-1]
    return align(own, theirs, p_re)
