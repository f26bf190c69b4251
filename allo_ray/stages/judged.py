"""Win rates: a judge compares each model's answers with the first model's, in both orders (paper's Table 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from allo_ray.config.engine import JudgeConfig
from allo_ray.endpoint import Endpoint
from evals.judge import Comparison, judge

Rows = list[dict[str, Any]]


def judge_answers(config: JudgeConfig, answers: Mapping[str, Rows], suites: set[str]) -> dict[str, int]:
    """Writes "win", "loss" or "tie" into the column `answer` of all rows (EVALS) of `suites`; a win is correct.

    The first model ties with itself. Rows without a verdict are removed from all models.

    Returns:
        how many rows of each model had no verdict.
    """
    endpoint = Endpoint(
        config.url,
        config.model,
        config.key_variable,
        config.concurrency,
        config.timeout_seconds,
        config.retries,
    )
    first, *others = answers
    against = {row["id"]: row["response"] for row in answers[first] if row["suite"] in suites}
    verdicts: dict[str, dict[str, str]] = {first: dict.fromkeys(against, "tie")}
    for label in others:
        rows = (row for row in answers[label] if row["suite"] in suites)
        asked = [Comparison(row["id"], row["prompt"], row["response"], against[row["id"]]) for row in rows]
        verdicts[label] = dict(judge(endpoint, asked)[1])
    judged = set(against).intersection(*verdicts.values())
    for label, rows in answers.items():
        rows[:] = [row for row in rows if row["suite"] not in suites or row["id"] in judged]
        for row in rows:
            if row["suite"] in suites:
                row["answer"] = verdicts[label][row["id"]]
                row["correct"] = row["answer"] == "win"
    return {label: len(against) - len(verdicts[label]) for label in others}
