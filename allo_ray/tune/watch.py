"""What the trials say of themselves, and the lines of the terminal that show it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import ray

from allo_ray.config.space import Value
from allo_ray.report.campaign_figures import worded
from allo_ray.report.terminal import Progress, StageLine
from allo_ray.tune.beside import beside_driver

LOOK_SECONDS = 1.0


class Board:
    """An actor beside the driver on which trials write what they do."""

    def __init__(self) -> None:
        self._words: dict[int, tuple[int, int, str]] = {}
        self._failures: dict[int, str] = {}

    def tell(self, number: int, finished: int, stages: int, text: str) -> None:
        self._words[number] = finished, stages, text

    def failed(self, number: int, trace: str) -> None:
        self._failures[number] = trace

    def read(self) -> tuple[dict[int, tuple[int, int, str]], dict[int, str]]:
        """What each trial does, and the traces of those that failed."""
        return self._words, self._failures


def put_up() -> Any:
    """Starts the board on this node."""
    return beside_driver(Board)


class Watch:
    """One live line a running trial and one for the campaign; a context manager around the search."""

    def __init__(self, board: Any, lines: Progress, total: int, ended: int) -> None:
        self._board, self._lines, self._total, self._ended = board, lines, total, ended
        self._trials: dict[int, StageLine] = {}
        self._campaign: StageLine | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def started(self, number: int, values: Mapping[str, Value]) -> None:
        told = ", ".join(f"{name} {worded(value)}" for name, value in values.items())
        self._trials[number] = self._lines.stage(f"trial {number} ({told})")

    def ended(self, number: int, words: str) -> None:
        self._ended += 1
        if self._campaign is not None:
            self._campaign.update(self._ended, self._total, "trials")
        line = self._trials.pop(number, None)
        if line is not None:
            line.close(words)

    def trace(self, number: int) -> str:
        """The trace of a trial that failed, if its process lived to tell."""
        return ray.get(self._board.read.remote())[1].get(number, "")

    def __enter__(self) -> Watch:
        self._campaign = self._lines.stage("campaign")
        self._campaign.update(self._ended, self._total, "trials")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        for line in self._trials.values():
            line.close("interrupted after")
        assert self._campaign is not None, "entered"
        self._campaign.close("" if kind is None else "interrupted after")

    def _look(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            words, _ = ray.get(self._board.read.remote())
            for number, line in list(self._trials.items()):
                if number in words:
                    finished, stages, text = words[number]
                    line.update(finished, stages, "stages", now=text)
