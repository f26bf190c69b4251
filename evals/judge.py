"""Win rate by a judge: which of two responses to an instruction is better, asked in both orders (paper 5.1)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from allo_ray.endpoint import Endpoint, RequestFailed
from evals.statistics import paired_p_value

Verdict = Literal["win", "loss", "tie"]

PROMPT = (
    "You compare two responses to an instruction. Judge helpfulness, correctness, relevance and clarity. Do not let "
    "the order of the responses or their length sway you.\n\n"
    "### Instruction:\n{instruction}\n\n### Response A:\n{a}\n\n### Response B:\n{b}\n\n"
    "Say shortly why, then end with exactly one of these lines:\nVerdict: A\nVerdict: B\nVerdict: tie"
)
_VERDICT = re.compile(r"verdict\s*:\s*\[*\**\s*(A|B|tie)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Comparison:
    """One instruction with the response of the model under test and that of the model it is held against."""

    id: str
    instruction: str
    response: str
    against: str


@dataclass(frozen=True)
class WinRate:
    """Outcome over all instructions. An instruction is won if both orders say so, or one does and the other ties."""

    wins: int
    losses: int
    ties: int
    #: Instructions where the judge gave no verdict in one order or both; they count in no share.
    failed: int
    #: Instructions where the verdict went with the position; they are among the ties.
    swayed: int

    @property
    def judged(self) -> int:
        return self.wins + self.losses + self.ties

    @property
    def rate(self) -> float:
        """Share of wins, a tie counting half; 0.5 where nothing was judged."""
        return (self.wins + self.ties / 2) / self.judged if self.judged else 0.5

    @property
    def p_value(self) -> float:
        """Exact sign test over the instructions that are no ties."""
        return paired_p_value(self.wins, self.losses)


def judge(
    endpoint: Endpoint, comparisons: Iterable[Comparison], max_tokens: int = 512
) -> tuple[WinRate, dict[str, Verdict]]:
    """Asks the judge twice for each comparison and returns the win rate and each instruction's verdict.

    Raises:
        UserError: the endpoint cannot be reached or refuses the key.
    """
    rows = {row.id: row for row in comparisons}
    votes: dict[str, dict[str, Verdict]] = {name: {} for name in rows}
    asked = endpoint.complete(_requests(rows), temperature=0, max_tokens=max_tokens)
    for key, answer in asked:
        name, _, order = key.rpartition("/")
        verdict = (
            None if isinstance(answer, RequestFailed) else read_verdict(answer, swapped=order == "swapped")
        )
        if verdict is not None:
            votes[name][order] = verdict
    outcome: dict[str, Verdict] = {}
    swayed = 0
    for name, given in votes.items():
        if len(given) == 2:
            score = sum({"win": 1, "loss": -1, "tie": 0}[vote] for vote in given.values())
            swayed += set(given.values()) == {"win", "loss"}
            outcome[name] = "win" if score > 0 else "loss" if score < 0 else "tie"
    counts = {kind: sum(verdict == kind for verdict in outcome.values()) for kind in ("win", "loss", "tie")}
    rate = WinRate(counts["win"], counts["loss"], counts["tie"], len(rows) - len(outcome), swayed)
    return rate, outcome


def read_verdict(answer: str, swapped: bool) -> Verdict | None:
    """The last verdict line of a judge's answer, seen from the model under test (A, or B where `swapped`)."""
    found = _VERDICT.findall(answer)
    if not found:
        return None
    letter = found[-1].upper()
    if letter == "TIE":
        return "tie"
    return "win" if (letter == "A") != swapped else "loss"


def _requests(rows: Mapping[str, Comparison]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    for row in rows.values():
        for order, a, b in (("straight", row.response, row.against), ("swapped", row.against, row.response)):
            text = PROMPT.format(instruction=row.instruction, a=a, b=b)
            yield f"{row.id}/{order}", [{"role": "user", "content": text}]
