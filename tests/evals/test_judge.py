"""The judge: both orders, ties, failures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest

from allo_ray.endpoint import RequestFailed
from evals.judge import Comparison, WinRate, judge, read_verdict

ROWS = [Comparison(f"i{n}", f"Question {n}", f"mine {n}", f"theirs {n}") for n in range(5)]


class Scripted:
    """Stands where the endpoint stands: answers each request by what it says in which order."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.texts = answers, {}

    def complete(
        self, requests: Iterable[tuple[str, Sequence[Any]]], **options: Any
    ) -> Iterator[tuple[str, Any]]:
        assert options["temperature"] == 0
        for name, messages in requests:
            self.texts[name] = messages[0]["content"]
            yield name, self.answers[name]


def test_both_orders_decide() -> None:
    """i0 wins both; i1 goes with the position, a tie; i2 loses one and ties one; i3 ties; i4 gives no verdict once."""
    told = {
        "i0/straight": "Better.\nVerdict: A",
        "i0/swapped": "Verdict: B",
        "i1/straight": "Verdict: A",
        "i1/swapped": "Verdict: A",
        "i2/straight": "verdict: tie",
        "i2/swapped": "**Verdict: [A]**",
        "i3/straight": "Verdict: tie",
        "i3/swapped": "Verdict: tie",
        "i4/straight": "Verdict: A",
        "i4/swapped": RequestFailed("status 500"),
    }
    client = Scripted(told)
    rate, verdicts = judge(client, ROWS)  # type: ignore[arg-type]
    assert verdicts == {"i0": "win", "i1": "tie", "i2": "loss", "i3": "tie"}
    assert rate == WinRate(wins=1, losses=1, ties=2, failed=1, swayed=1)
    assert rate.rate == 0.5
    assert rate.judged == 4
    assert rate.p_value == 1.0
    straight, swapped = client.texts["i0/straight"], client.texts["i0/swapped"]
    assert straight.index("mine 0") < straight.index("theirs 0")
    assert swapped.index("theirs 0") < swapped.index("mine 0")


@pytest.mark.parametrize(
    ("answer", "swapped", "verdict"),
    [
        ("Verdict: A", False, "win"),
        ("Verdict: A", True, "loss"),
        ("Verdict: B", True, "win"),
        ("At first verdict: B. But no. Verdict: A", False, "win"),
        ("Verdict: TIE", True, "tie"),
        ("Verdict: Apple", False, None),
        ("A", False, None),
    ],
)
def test_read_verdict(answer: str, swapped: bool, verdict: str | None) -> None:
    assert read_verdict(answer, swapped) == verdict


def test_win_rate_counts_a_tie_as_half() -> None:
    assert WinRate(wins=6, losses=2, ties=4, failed=0, swayed=0).rate == pytest.approx(8 / 12)
    assert WinRate(0, 0, 0, 3, 0).rate == 0.5
