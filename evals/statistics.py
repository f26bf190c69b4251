"""Intervals and tests for accuracies, right for small test sets too."""

from __future__ import annotations

from math import comb, sqrt

#: Two-sided 95 % quantile of the normal distribution.
Z95 = 1.959963984540054


def wilson_interval(correct: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a share (95 % by default), as fractions.

    Args:
        correct: right answers.
        n: questions; with 0 questions nothing is known and the interval is (0, 1).
    """
    assert 0 <= correct <= n, "no more right answers than questions"
    if n == 0:
        return 0.0, 1.0
    share = correct / n
    centre = share + z * z / (2 * n)
    spread = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def paired_p_value(wins: int, losses: int) -> float:
    """Exact two-sided McNemar test: could `wins` and `losses` be tosses of a fair coin?

    Args:
        wins: questions that only the first model answers; losses: that only the second one answers.

    Returns:
        Twice the smaller binomial tail, at most 1.
    """
    n, tail = wins + losses, min(wins, losses)
    total = sum(comb(n, k) for k in range(tail + 1))
    return min(1.0, total / 2 ** (n - 1)) if n else 1.0
