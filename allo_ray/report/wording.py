"""How numbers are worded, the same in the report and in the terminal."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_UP, Decimal

NONE = "–"
#: A space at which no line breaks.
NBSP = "\u00a0"


def rounded(value: float, digits: int) -> Decimal:
    """Halves away from zero, as a reader rounds: 0.6125 and 0.1725 are 61.3 % and 17.3 points, so that sums agree."""
    return Decimal(repr(round(float(value), 9))).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)


def percent(share: float | None, digits: int = 1) -> str:
    return NONE if share is None or math.isnan(share) else f"{rounded(100 * share, digits)}{NBSP}%"


def interval(low: float, high: float) -> str:
    return f"[{rounded(100 * low, 1)}, {rounded(100 * high, 1)}]"


def points(gain: float) -> str:
    """A difference of two accuracies in percentage points, with its sign."""
    return f"{rounded(100 * gain, 1):+}".replace("-", "−")


def p_value(p: float) -> str:
    """Two significant digits and at least two decimals: p = 0.00031, p = 0.42, p < 0.0001."""
    if math.isnan(p):
        return f"p{NBSP}{NONE}"
    if p < 1e-4:
        return f"p{NBSP}<{NBSP}0.0001"
    return f"p{NBSP}={NBSP}{p:.{max(2, 1 - math.floor(math.log10(p)))}f}"


def count(n: int) -> str:
    return f"{n:,}"


def duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def figure(value: float) -> str:
    """A measured number of unknown size, in four significant digits."""
    if math.isnan(value):
        return NONE
    return f"{value:.4g}".replace("-", "−")


def amount(size: float, unit: str = "B") -> str:
    """Bytes in powers of 1000."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(size) < 1000 or prefix == "T":
            return f"{size:.0f} {unit}" if not prefix else f"{size:.1f} {prefix}{unit}"
        size /= 1000
    raise AssertionError
