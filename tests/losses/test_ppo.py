"""PPO's clipped surrogate, against hand-derived numbers."""

from __future__ import annotations

import math

import pytest
import torch

from allo_ray.losses.base import LossInputs
from allo_ray.losses.ppo import ppo


def inputs(ratios: list[float], weight: list[float], sequence: list[int]) -> LossInputs:
    """Tokens whose policy has `ratios` times the reference's probability (0.5)."""
    reference = math.log(0.5)
    policy = torch.tensor([reference + math.log(ratio) for ratio in ratios], requires_grad=True)
    return LossInputs(
        policy,
        torch.full((len(ratios),), reference),
        torch.tensor(weight),
        torch.tensor(sequence),
        sequences=max(sequence) + 1,
    )


def test_the_first_step_is_minus_the_sum_of_advantages() -> None:
    """Ratio 1 everywhere: 3 tokens of y+ at +1 and 2 of y- at -1 and -0.25, so -(3 - 1.25); the gradient is -A."""
    told = inputs([1.0] * 5, [1, 1, 1, 1, 0.25], [0, 0, 0, 1, 1])
    output = ppo(told)
    assert float(output.sum.detach()) == pytest.approx(-1.75, abs=1e-6)
    assert (int(output.count), int(output.tokens)) == (1, 5)
    [gradient] = torch.autograd.grad(output.sum, told.policy)
    assert gradient.tolist() == pytest.approx([-1, -1, -1, 1, 0.25], abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "rejected", "term", "slope"),
    [
        (1.1, False, -1.1, -1.1),  # inside the range: d ratio / d log-prob = ratio
        (1.5, False, -1.2, 0.0),  # good, and raised enough
        (0.5, False, -0.5, -0.5),  # good, but lowered: pulled back however far away
        (0.9, True, 0.9, 0.9),
        (0.5, True, 0.8, 0.0),  # bad, and lowered enough
        (1.5, True, 1.5, 1.5),  # bad, but raised
    ],
)
def test_clipping_stops_the_gradient_on_the_side_already_won(
    ratio: float, rejected: bool, term: float, slope: float
) -> None:
    """One token with a moved ratio; the pair's other response has weight 0. clip 0.2."""
    told = inputs([1.0, ratio], [0, 1], [0, 1]) if rejected else inputs([ratio, 1.0], [1, 0], [0, 1])
    output = ppo(told, clip=0.2)
    assert float(output.sum.detach()) == pytest.approx(term, abs=1e-6)
    [gradient] = torch.autograd.grad(output.sum, told.policy)
    assert float(gradient[1 if rejected else 0]) == pytest.approx(slope, abs=1e-6)


def test_weights_are_the_size_of_the_advantage() -> None:
    """Two pairs; blame 0.5 halves term and gradient of a token of y-, and weight 0 takes it out."""
    told = inputs([1.0, 1.1, 1.1, 1.0, 0.9, 1.1], [1, 0.5, 0, 1, 1, 0.5], [0, 1, 1, 2, 3, 3])
    output = ppo(told)
    assert float(output.sum.detach()) == pytest.approx(-(1 - 0.55) - (1 - 0.9 - 0.55), abs=1e-6)
    assert int(output.count) == 2
    [gradient] = torch.autograd.grad(output.sum, told.policy)
    assert gradient.tolist() == pytest.approx([-1, 0.55, 0, -1, 0.9, 0.55], abs=1e-6)


def test_stays_finite_far_out() -> None:
    told = LossInputs(
        torch.tensor([300.0, -300.0, 300.0, -300.0], requires_grad=True),
        torch.zeros(4),
        torch.ones(4),
        torch.tensor([0, 0, 1, 1]),
        sequences=2,
    )
    output = ppo(told)
    [gradient] = torch.autograd.grad(output.sum, told.policy)
    assert math.isfinite(float(output.sum.detach()))
    assert gradient.isfinite().all()
