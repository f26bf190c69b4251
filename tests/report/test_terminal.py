"""Progress and the closing table, on a console that is no terminal and on one that is."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable

import pytest
from rich.console import Console

from allo_ray.report.content import Comparison, ModelScores, ReportData
from allo_ray.report.terminal import Progress, closing
from allo_ray.report.wording import NBSP


class Clock:
    """Time that passes only when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width)


def shown(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().replace(NBSP, " ").splitlines()


def test_plain_lines_come_at_most_every_interval() -> None:
    """100 updates in 25 s: a line at the start, at 10 s, at 20 s, and at the end."""
    console, clock = plain(), Clock()
    with Progress(console, interval=10, clock=clock) as progress:
        stage = progress.stage("warmup")
        for step in range(1, 101):
            clock.now += 0.25
            stage.update(step, 100, "steps", loss=0.69315 - step / 1000)
        stage.close()
    # From the first update (step 1 at 0.25 s) on: 4 steps a second.
    assert shown(console) == [
        "warmup: started",
        "warmup: 40/100 steps  4 steps/s  15 s left  loss 0.6532",
        "warmup: 80/100 steps  4 steps/s  5.0 s left  loss 0.6132",
        "warmup: done 100 steps, 25 s",
    ]


def test_plain_lines_are_not_repeated_and_stages_have_no_rate() -> None:
    """Four updates of a trial, two of them news."""
    console, clock = plain(), Clock()
    with Progress(console, interval=10, clock=clock) as progress, progress.stage("trial 0") as stage:
        for done, now in ((1, "forget"), (1, "forget"), (2, "learn"), (2, "learn")):
            clock.now += 10
            stage.update(done, 4, "stages", now=now)
    assert shown(console)[1:] == [
        "trial 0: 1/4 stages  now forget",
        "trial 0: 2/4 stages  now learn",
        "trial 0: done 2 stages, 40 s",
    ]


def test_what_an_earlier_run_finished_does_not_count_into_the_rate() -> None:
    """Resumed at 900 of 1,000 rows after 50 s of start-up: 10 rows in 5 s are 2 rows a second, 45 s left."""
    console, clock = plain(), Clock()
    with Progress(console, interval=1, clock=clock) as progress, progress.stage("sample") as stage:
        clock.now = 50
        stage.update(900, 1000, "rows")
        clock.now = 55
        stage.update(910, 1000, "rows", tokens_per_second=1234, note="[red]")
    assert shown(console) == [
        "sample: started",
        "sample: 900/1,000 rows",
        "sample: 910/1,000 rows  2 rows/s  45 s left  tokens per second 1,234  note [red]",
        "sample: done 910 rows, 55 s",
    ]


def test_a_new_unit_starts_a_new_rate_and_a_total_may_be_unknown() -> None:
    console, clock = plain(), Clock()
    with Progress(console, interval=0, clock=clock) as progress:
        stage = progress.stage("score")
        stage.update(0, None, "rows")
        clock.now = 10
        stage.update(100, None, "rows")
        stage.update(1, 4, "steps")
        clock.now = 12
        stage.update(2, 4, "steps")
    assert shown(console)[1:] == ["score: 0 rows", "score: 100 rows  10 rows/s", "score: 1/4 steps"] + [
        "score: 2/4 steps  0.5 steps/s  4.0 s left"
    ]


def test_a_failed_stage_says_so_and_a_stage_closes_once() -> None:
    console, clock = plain(), Clock()
    with Progress(console, clock=clock) as progress:
        stage = progress.stage("pair")
        clock.now = 3
        with pytest.raises(RuntimeError), stage:
            raise RuntimeError
        stage.close()
        progress.stage("locate").close("from the store")
    assert shown(console) == [
        "pair: started",
        "pair: failed after 3.0 s",
        "locate: started",
        "locate: from the store 0.0 s",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_many_stages_at_once_from_many_threads(terminal: bool) -> None:
    """8 threads, 200 updates each: each stage ends with its own count, and no line is torn."""
    console = Console(file=io.StringIO(), width=100, force_terminal=terminal, color_system=None)
    with Progress(console, interval=0) as progress:

        def work(index: int) -> None:
            with progress.stage(f"stage{index}") as stage:
                for done in range(1, 201):
                    stage.update(done, 200, "rows", loss=0.5)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    ends = [line for line in shown(console) if "done 200 rows" in line]
    assert sorted(line[line.index("stage") :].split(":")[0] for line in ends) == [
        f"stage{i}" for i in range(8)
    ]
    if not terminal:
        assert all(line.startswith("stage") for line in shown(console))
        assert len(shown(console)) == 8 * 202


def test_a_terminal_shows_bar_rate_and_time_left() -> None:
    terminal = {"TERM": "xterm-256color"}  # whatever the tests themselves run in
    console = Console(
        file=io.StringIO(), width=100, force_terminal=True, color_system=None, _environ=terminal
    )
    clock = Clock()
    with Progress(console, clock=clock) as progress:
        stage = progress.stage("learn")
        stage.update(10, 40, "steps", loss=0.7)
        clock.now = 10
        stage.update(20, 40, "steps", loss=0.6)
        assert progress.live is not None
        progress.live.refresh()
        stage.close()
        progress.say("[not markup]")
    text = "\n".join(shown(console))
    assert "20/40 steps  1 steps/s  20 s left  loss 0.6" in text
    assert "━" in text
    assert "[not markup]" in text
    assert "learn: done 20 steps, 10 s" in text


def test_the_closing_table_tells_every_model_and_path(build_run: Callable[..., ReportData]) -> None:
    data = build_run()
    console = plain(100)
    paths = {"report": "runs/quickstart/report.html", "aligned model": "runs/quickstart/aligned/" + "x" * 120}
    closing(console, data.models, data.comparisons, paths)
    lines = shown(console)
    assert lines[1].split("  ")[0] == "model"
    assert any(
        line.startswith("ALLO") and "61.3 %  [56.5, 66.0]" in line and "75.8 %" in line for line in lines
    )
    assert "ALLO against SFT on two-digit sums: +17.3 points, p = 0.00031" in lines
    assert "report         runs/quickstart/report.html" in lines
    assert f"aligned model  {paths['aligned model']}" in lines


def test_the_closing_table_of_an_uneven_or_empty_run() -> None:
    console = plain()
    scores = [ModelScores("[b]", "a", 1, 2, 0.1, 0.9), ModelScores("other", "b", 0, 0, 0, 0)]
    closing(console, scores, [Comparison("[b]", "other", "a", -0.1, 1.0)], {})
    text = "\n".join(shown(console))
    assert "[b]" in text
    assert "–" in text
    assert "−10.0 points, p = 1.00" in text
    before = shown(console)
    closing(console, [], [], {})
    assert shown(console) == before
