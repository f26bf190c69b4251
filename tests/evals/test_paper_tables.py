"""The paper's figures: typed in once, checked against its own averages."""

from __future__ import annotations

import pytest

from evals.paper_tables import PAPER, TABLE_2_SUITES, TABLE_3_SUITES, beside_paper
from evals.suites.registry import SUITES

#: The "Avg." columns of Tables 2 and 3: question answering, mathematics, instructions.
AVERAGES = {
    "SFT LLM": (58.45, 51.1, 50.00),
    "SFT": (58.40, 51.4, 55.47),
    "RFT": (59.78, 50.5, 51.88),
    "DPO": (62.99, 52.0, 61.05),
    "R-DPO": (63.83, 52.2, 63.10),
    "IPO": (44.06, 52.2, 63.68),
    "BCO": (56.67, 51.9, 63.30),
    "SimPO": (53.89, 52.4, 62.11),
    "NPO": (59.00, 51.3, 50.58),
    "Vanilla PPO": (58.92, 50.7, 48.48),
    "PPO A2C": (59.40, 51.2, 55.65),
    "ALLO": (64.67, 52.6, 65.34),
}


@pytest.mark.parametrize("method", PAPER)
def test_figures_give_the_papers_averages(method: str) -> None:
    """To the paper's own rounding; a slip of the pen in one figure would show here."""
    row = PAPER[method]
    for suites, average, digits in zip(
        (TABLE_2_SUITES[:4], TABLE_2_SUITES[4:], TABLE_3_SUITES),
        AVERAGES[method],
        (0.0051, 0.051, 0.0051),
        strict=True,
    ):
        assert sum(row[suite] for suite in suites) / len(suites) == pytest.approx(average, abs=digits)


def test_suites_are_ours() -> None:
    assert set(TABLE_2_SUITES) | set(TABLE_3_SUITES) <= set(SUITES)


def test_measured_figures_stand_beside_the_papers() -> None:
    table = beside_paper(
        {"ALLO": {"gsm8k": 40.26, "sums": 71.0}, "DPO": {"gsm8k": 39.0}, "mine": {"sums": 1.0}}
    )
    assert table == (
        "| method | gsm8k | sums |\n|---|---|---|\n| DPO | 39.0 (56.6) |  |\n"
        "| ALLO | 40.3 (56.6) | 71.0 |\n| mine |  | 1.0 |"
    )
