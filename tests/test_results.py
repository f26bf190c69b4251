"""Scores and comparisons of models, and the folder of a run."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from allo_ray import results, tables
from allo_ray.config.load import load


def _answers(suite: str, told: list[bool | str]) -> pa.Table:
    rows = []
    for number, value in enumerate(told):
        verdict = value if isinstance(value, str) else None
        rows.append(
            {
                "suite": suite,
                "id": str(number),
                "prompt": "",
                "response": "",
                "answer": verdict,
                "reference": None,
                "correct": value == "win" if verdict else value,
            }
        )
    return tables.EVALS.build(rows)


def test_each_model_is_compared_with_the_first_and_allo_with_dpo() -> None:
    """SFT is right on {0}, DPO on {0, 1}, ALLO on {0, 1, 2} of 4: ALLO gains 2/4 with 2 wins and no loss.

    Two tosses of a fair coin fall on one side with 2 * 1/4 = 0.5.
    """
    answers = {
        "SFT": _answers("s", [True, False, False, False]),
        "DPO": _answers("s", [True, True, False, False]),
        "ALLO": _answers("s", [True, True, True, False]),
    }
    scores, comparisons = results.compare(answers)
    assert [(score.label, score.correct, score.n) for score in scores] == [
        ("SFT", 1, 4),
        ("DPO", 2, 4),
        ("ALLO", 3, 4),
    ]
    told = [(item.a, item.b, item.gain, item.p) for item in comparisons]
    assert told == [("ALLO", "SFT", 0.5, 0.5), ("ALLO", "DPO", 0.25, 1.0), ("DPO", "SFT", 0.25, 1.0)]


def test_a_tie_counts_half_where_a_judge_decides() -> None:
    """3 wins, 1 loss, 2 ties of 6: a win rate of (3 + 1) / 6; the gain over the first model is (3 - 1) / 6.

    The sign test sees 3 wins and 1 loss: 2 * (1 + 4) / 16 = 0.625.
    """
    answers = {
        "SFT": _answers("open", ["tie"] * 6),
        "ALLO": _answers("open", ["win", "win", "win", "loss", "tie", "tie"]),
    }
    scores, [comparison] = results.compare(answers, ["open"])
    assert [(score.label, score.correct, score.n) for score in scores] == [("SFT", 3, 6), ("ALLO", 4, 6)]
    assert comparison.gain == pytest.approx(2 / 6)
    assert comparison.p == pytest.approx(0.625)


def test_runs_of_one_name_and_other_configs_get_folders_of_their_own(tmp_path: Path) -> None:
    first = load("smoke", [f"runs={tmp_path}"])
    second = load("smoke", [f"runs={tmp_path}", "forget.u=0.5"])
    assert results.claim(first) == tmp_path / "smoke"
    assert results.claim(second) == tmp_path / "smoke-2"
    assert results.claim(first) == tmp_path / "smoke"


def test_time_is_covered_once_however_many_stages_work() -> None:
    """[0, 4] and [2, 5] cover 5 s, [3, 4] adds nothing, [7, 9] adds 2."""
    assert results.covered([(7, 9), (2, 5), (0, 4), (3, 4)]) == 7
    assert results.covered([]) == 0
