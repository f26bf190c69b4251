"""Seconds of a piece of work that are not work."""

from __future__ import annotations

from typing import NamedTuple


class Spent(NamedTuple):
    """Seconds that processes took to start (a share of them, where they served others too), and seconds that passed
    for others' sake."""

    startup: float
    waited: float = 0.0
