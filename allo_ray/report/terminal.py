"""What the terminal shows: one live line a running stage, and the table at the end.

Where nobody watches (a file, a job's log) the live lines become plain ones, at most one a stage every few seconds, and
none while nothing is new.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from rich import progress as bars
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from allo_ray.report.content import Comparison, ModelScores
from allo_ray.report.wording import NONE, count, duration, figure, interval, p_value, percent, points


class StageLine:
    """The line of one running stage. Every method may be called from any thread."""

    def __init__(self, owner: Progress, name: str) -> None:
        self.name = name
        self._owner = owner
        self._started = self._shown = owner.clock()
        self._facts = "starting"
        self._said: object = None
        self._unit: str | None = None
        self._done, self._total = 0, None
        self._anchor = 0, self._started
        self._task = owner.live.add_task(name, total=None, text=self._facts) if owner.live else None
        self._open = True
        if self._task is None:
            owner.say(f"{name}: started")

    def update(self, done: int, total: int | None, unit: str, **facts: object) -> None:
        """Tells that `done` of `total` units (rows, steps ...) are finished; facts are shown behind, such as loss=0.61.

        The rate is counted from the first update of a unit on, so that neither start-up nor what an earlier run had
        already finished spoils it. Stages have none: one may take a hundred times as long as the next.
        """
        with self._owner.lock:
            now = self._owner.clock()
            if unit != self._unit or done < self._done:
                self._anchor = done, now
            self._done, self._total, self._unit = done, total, unit
            self._facts = self._words(now, facts)
            news = done, total, unit, facts
            if self._task is not None and self._owner.live:
                self._owner.live.update(self._task, completed=done, total=total, text=self._facts)
            elif now - self._shown >= self._owner.interval and news != self._said:
                self._shown, self._said = now, news
                self._owner.say(f"{self.name}: {self._facts}")

    def close(self, note: str = "") -> None:
        """Ends the line with what was done and how long it took; a second call does nothing."""
        with self._owner.lock:
            if not self._open:
                return
            self._open = False
            if self._task is not None and self._owner.live:
                self._owner.live.remove_task(self._task)
            took = duration(self._owner.clock() - self._started)
            done = f"{count(self._done)} {self._unit}" if self._unit else ""
            self._owner.say(
                f"{self.name}: {note or 'done'} " + ", ".join(part for part in (done, took) if part)
            )

    def __enter__(self) -> StageLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.close("" if kind is None else "failed after")

    def _words(self, now: float, facts: Mapping[str, object]) -> str:
        parts = [f"{count(self._done)}{'' if self._total is None else f'/{count(self._total)}'} {self._unit}"]
        done, since = self._anchor
        if self._unit != "stages" and self._done > done and now > since:
            rate = (self._done - done) / (now - since)
            parts.append(f"{rate:.3g} {self._unit}/s")
            if self._total is not None and self._total > self._done:
                parts.append(f"{duration((self._total - self._done) / rate)} left")
        parts += [f"{name.replace('_', ' ')} {_fact(value)}" for name, value in facts.items()]
        return "  ".join(parts)


class Progress:
    """All running stages; a context manager around the whole run. Several stages may run at once.

    On a terminal each stage has a live bar; elsewhere a plain line every `interval` seconds at most.
    """

    def __init__(
        self,
        console: Console | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or Console()
        self.interval = interval
        self.clock = clock
        self.lock = threading.RLock()
        self.live: bars.Progress | None = None
        if self.console.is_terminal:
            cut = Column(no_wrap=True, overflow="ellipsis")
            self.live = bars.Progress(
                bars.TextColumn("[bold]{task.description}"),
                bars.BarColumn(bar_width=24),
                bars.TextColumn("{task.fields[text]}", table_column=cut, markup=False),
                console=self.console,
                transient=True,
            )

    def stage(self, name: str) -> StageLine:
        """Opens the line of a stage; close it, or use it in a with-block."""
        with self.lock:
            return StageLine(self, name)

    def say(self, text: str) -> None:
        """One line that stays, above the live ones."""
        with self.lock:
            self.console.print(Text(text), soft_wrap=True, highlight=False)

    def __enter__(self) -> Progress:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()


def _fact(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return count(value) if isinstance(value, int) else figure(value)


def closing(
    console: Console,
    models: Sequence[ModelScores],
    comparisons: Sequence[Comparison],
    paths: Mapping[str, object],
) -> None:
    """Prints the end of a run: models x suites with 95 % intervals, the paired comparisons, and where things lie."""
    labels = list(dict.fromkeys(score.label for score in models))
    suites = list(dict.fromkeys(score.suite for score in models))
    scores = {(score.label, score.suite): score for score in models}
    table = Table(box=None, header_style="dim", pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("model")
    for suite in suites:
        table.add_column(Text(suite), justify="right")
    best = {suite: max(score.accuracy for score in models if score.suite == suite) for suite in suites}
    for label in labels:
        table.add_row(Text(label), *(_cell(scores.get((label, suite)), best[suite]) for suite in suites))
    width = max((len(name) for name in paths), default=0)
    blocks = (
        [table] if models else [],
        [
            Text(f"{item.a} against {item.b} on {item.suite}: {points(item.gain)} points, {p_value(item.p)}")
            for item in comparisons
        ],
        [Text(f"{name:<{width}}  {path}") for name, path in paths.items()],
    )
    for block in blocks:
        if block:
            console.print()
        for part in block:
            # A path is one line, however long, so that it can be copied.
            console.print(part, soft_wrap=isinstance(part, Text), highlight=False)


def _cell(score: ModelScores | None, best: float) -> Text:
    if score is None:
        return Text(NONE)
    strong = "bold" if score.accuracy == best else ""
    return Text.assemble((percent(score.accuracy), strong), (f"  {interval(score.low, score.high)}", "dim"))
