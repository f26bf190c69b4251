"""Sums of a batch job's figures."""

from __future__ import annotations

from typing import Any

import pytest

from allo_ray.data.tally import Tally, gauges, rates


def shard(**changes: Any) -> dict[str, Any]:
    told: dict[str, Any] = {"rejected": 1, "killed": 0, "tokens_in": 100, "tokens_out": 50}
    told |= {"ready": 10.0, "started": 12.0}
    told |= {"ended": 16.0, "engine_seconds": 3.0, "private_bytes": 7, "actor": "a", "cpu_seconds": 2.0}
    return told | {"running": 4, "waiting": 5, "cached_tokens": 30, "prompt_tokens": 120} | changes


def test_figures_of_three_shards_by_two_actors() -> None:
    """From second 12 to 22 are 10 s; 300 tokens in, so 30 a second; actor a used 5 CPU seconds in all, actor b two.

    The first engine was ready 9 s after the call.
    """
    tally = Tally()
    for told in (shard(), shard(actor="b", ready=11.0), shard(ended=22.0, cpu_seconds=5.0, private_bytes=9)):
        tally.add(told)
    assert tally.summary(called=1.0) == {
        **{"rejected": 3, "killed": 0, "tokens_in": 300, "tokens_out": 150, "seconds": 10.0},
        **{"startup_seconds": 9.0, "engine_seconds": 3.0, "actors": 2, "cpu_seconds": 7.0},
        **{
            "peak_private_bytes": 9,
            "tokens_in_per_second": 30.0,
            "tokens_out_per_second": 15.0,
            "cached": 0.25,
        },
    }


def test_gauges_are_those_of_all_engines_together() -> None:
    """Actor a told last of the first job, actor b of the second: 1 + 8 run, 0 + 5 wait, 30 + 90 of 240 were cached.

    Actor c has told nothing since; where two can be alive its requests are gone with it, not what it had found cached.
    """
    tallies = [Tally(), Tally()]
    tallies[1].add(shard(ended=13.0))
    tallies[1].add(shard(ended=12.5, running=7))  # told late
    tallies[0].add(shard(ended=17.0, running=1, waiting=0))
    tallies[0].add(shard(actor="c", ended=14.0, cached_tokens=60))
    tallies[1].add(shard(actor="b", ended=18.0, running=8, cached_tokens=90))
    assert gauges(tallies[1:], 2) == {"running": 4 + 8, "waiting": 5 + 5, "cached": 120 / 240}
    assert gauges(tallies, 2) == {"running": 1 + 8, "waiting": 0 + 5, "cached": 180 / 360}
    assert gauges(tallies, 3)["running"] == 1 + 8 + 4


def test_rates_count_from_the_first_ready_engine_over_all_jobs() -> None:
    """200 tokens in and 100 out between seconds 10 and 18; a job without a shard yet adds nothing."""
    tallies = [Tally(), Tally(), Tally()]
    tallies[0].add(shard())
    tallies[1].add(shard(ready=11.0, ended=18.0))
    assert rates(tallies) == {
        "tokens_in_per_second": pytest.approx(25.0),
        "tokens_out_per_second": pytest.approx(12.5),
    }


def test_a_job_with_nothing_to_do() -> None:
    assert Tally().summary(called=0.0)["seconds"] == 0.0
