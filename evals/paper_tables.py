"""The paper's Tables 2 and 3 as data, and a table that sets measured figures beside them.

Source: arXiv 2406.12606, LLaMA 2 7B. Accuracy in percent; for instructions the win rate over the SFT model in percent.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Suites of this program in the order of the paper's columns.
TABLE_2_SUITES = ("ecqa", "qasc", "openbookqa", "strategyqa", "gsm8k", "math", "mawps", "tabmwp")
TABLE_3_SUITES = ("alpaca_eval", "arena_hard")

_TABLE_2 = {
    "SFT LLM": (69.92, 55.51, 52.60, 55.75, 55.9, 11.8, 79.9, 56.7),
    "SFT": (69.14, 55.40, 49.80, 59.24, 56.2, 11.8, 80.0, 57.4),
    "RFT": (71.15, 57.24, 54.40, 56.33, 54.7, 12.0, 80.2, 55.2),
    "DPO": (75.07, 60.37, 57.00, 59.53, 56.6, 12.2, 81.7, 57.3),
    "R-DPO": (75.52, 61.56, 58.40, 59.83, 56.9, 12.3, 82.3, 57.2),
    "IPO": (47.86, 43.20, 41.80, 43.38, 58.0, 12.9, 82.4, 55.5),
    "BCO": (68.87, 55.18, 45.40, 57.21, 57.2, 12.4, 81.8, 56.3),
    "SimPO": (62.76, 52.27, 46.80, 53.71, 57.9, 12.8, 82.1, 56.7),
    "NPO": (70.56, 56.59, 52.80, 56.04, 56.4, 12.3, 80.1, 56.5),
    "Vanilla PPO": (70.65, 55.29, 53.40, 56.33, 55.2, 11.6, 79.4, 56.5),
    "PPO A2C": (71.06, 55.18, 53.00, 58.37, 55.2, 11.7, 82.1, 55.8),
    "ALLO": (75.93, 62.31, 59.60, 60.84, 56.6, 13.0, 82.5, 58.1),
}
_TABLE_3 = {
    "SFT LLM": (50.00, 50.00),
    "SFT": (49.44, 61.50),
    "RFT": (50.06, 53.70),
    "DPO": (53.80, 68.30),
    "R-DPO": (54.00, 72.20),
    "IPO": (56.35, 71.00),
    "BCO": (54.79, 71.80),
    "SimPO": (54.92, 69.30),
    "NPO": (50.06, 51.10),
    "Vanilla PPO": (48.75, 48.20),
    "PPO A2C": (53.50, 57.80),
    "ALLO": (55.78, 74.90),
}

#: {method: {suite: percent}}
PAPER: dict[str, dict[str, float]] = {
    method: {
        **dict(zip(TABLE_2_SUITES, _TABLE_2[method], strict=True)),
        **dict(zip(TABLE_3_SUITES, _TABLE_3[method], strict=True)),
    }
    for method in _TABLE_2
}


def beside_paper(measured: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table: one row a method, in each cell the measured percentage, then the paper's in brackets.

    Args:
        measured: {method: {suite: percent}}; methods and suites that the paper does not have stand last, alone.
    """
    suites = [
        suite
        for suite in (*TABLE_2_SUITES, *TABLE_3_SUITES)
        if any(suite in row for row in measured.values())
    ]
    suites += sorted({suite for row in measured.values() for suite in row} - set(suites))
    methods = [method for method in PAPER if method in measured]
    methods += [method for method in measured if method not in PAPER]
    lines = [f"| method | {' | '.join(suites)} |", "|---" * (len(suites) + 1) + "|"]
    for method in methods:
        cells = [_cell(measured[method].get(suite), PAPER.get(method, {}).get(suite)) for suite in suites]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(measured: float | None, paper: float | None) -> str:
    told = "" if measured is None else f"{measured:.1f}"
    return told if paper is None else f"{told} ({paper:.1f})".strip()
