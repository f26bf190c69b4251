"""Eq. 8 at the first step: all ratios are equal where the reference is the start itself, so nothing is dropped."""

from __future__ import annotations

from allo_ray.config.train import TrainConfig
from allo_ray.train.loop import Plan


def _plan(own_reference: bool) -> Plan:
    return Plan(
        loss="masked_dpo",
        loss_args={"beta": 0.1, "v": 0.5},
        config=TrainConfig(lr=1e-5),
        steps=3,
        micro_batch_tokens=64,
        own_reference=own_reference,
    )


def test_the_first_step_drops_nothing_and_the_next_ones_do() -> None:
    assert _plan(own_reference=True).arguments(0) == {"beta": 0.1, "v": 0.0}
    assert _plan(own_reference=True).arguments(1) == {"beta": 0.1, "v": 0.5}


def test_against_another_model_the_first_step_drops_too() -> None:
    assert _plan(own_reference=False).arguments(0) == {"beta": 0.1, "v": 0.5}
