"""Sums of a batch job's figures."""

from __future__ import annotations

import pytest

from allo_ray.data.tally import Tally, rates


def shard(**changes: float) -> dict[str, float]:
    told = {"rejected": 1, "killed": 0, "tokens_in": 100, "tokens_out": 50, "ready": 10.0, "started": 12.0}
    told |= {"ended": 16.0, "engine_seconds": 3.0, "private_bytes": 7, "actor": 1, "cpu_seconds": 2.0}
    return told | {"running": 4, "waiting": 5, "cached_tokens": 30, "prompt_tokens": 120} | changes


def test_figures_of_three_shards_by_two_actors() -> None:
    """From second 12 to 22 are 10 s; 300 tokens in, so 30 a second; actor 1 used 5 CPU seconds in all, actor 2 two.

    The first engine was ready 9 s after the call.
    """
    tally = Tally()
    for told in (shard(), shard(actor=2, ready=11.0), shard(ended=22.0, cpu_seconds=5.0, private_bytes=9)):
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
    assert tally.gauges == {"running": 4, "waiting": 5, "cached": 0.25}


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
