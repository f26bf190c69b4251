"""Forgetting: Eq. 6 and 7."""

from __future__ import annotations

import math

import pytest
import torch

from allo_ray.losses.base import LossInputs
from allo_ray.losses.npo import npo, npo_sequence


def rejected(
    policy: list[float], weight: list[float], sequence: list[int], reference: float = 0.0
) -> LossInputs:
    return LossInputs(
        torch.tensor(policy, requires_grad=True),
        torch.full((len(policy),), reference),
        torch.tensor(weight),
        torch.tensor(sequence),
        sequences=max(sequence) + 1,
    )


def test_first_step_is_ln_2_a_selected_token():
    """policy = reference: each of the 3 tokens with r = 1 gives ln 2, the one with r = 0 nothing."""
    output = npo(rejected([-1.0] * 4, [1, 0, 1, 1], [0, 0, 0, 1], reference=-1.0))
    assert float(output.sum.detach()) == pytest.approx(3 * math.log(2), abs=1e-6)
    assert (int(output.count), int(output.tokens)) == (2, 3)


def test_token_form_by_hand():
    """beta 0.5, log-ratios 2 and -4: log(1 + e^1) + log(1 + e^-2); gradient beta sigmoid(beta log-ratio)."""
    inputs = rejected([2.0, -4.0, 7.0], [1, 1, 0], [0, 0, 0])
    output = npo(inputs, beta=0.5)
    assert float(output.sum.detach()) == pytest.approx(
        math.log1p(math.e) + math.log1p(math.exp(-2)), abs=1e-6
    )
    [gradient] = torch.autograd.grad(output.sum, inputs.policy)
    sigmoid = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))]
    assert gradient.tolist() == pytest.approx([0.5 * sigmoid[0], 0.5 * sigmoid[1], 0.0], abs=1e-6)


def test_sequence_form_by_hand():
    """beta 0.5, log-ratios 2 - 4 = -2 and 6: log(1 + e^-1) + log(1 + e^3)."""
    output = npo_sequence(rejected([2.0, -4.0, 6.0], [1, 1, 1], [0, 0, 1]), beta=0.5)
    expected = math.log1p(math.exp(-1)) + math.log1p(math.exp(3))
    assert float(output.sum.detach()) == pytest.approx(expected, abs=1e-6)
    assert (int(output.count), int(output.tokens)) == (2, 3)


def test_soft_weight_multiplies_the_token_s_term():
    """Weights 0.25 and 0.5 at policy = reference: 0.75 ln 2 over two weighted tokens."""
    output = npo(rejected([0.0, 0.0], [0.25, 0.5], [0, 0]))
    assert float(output.sum.detach()) == pytest.approx(0.75 * math.log(2), abs=1e-6)
    assert int(output.tokens) == 2


@pytest.mark.parametrize("loss", [npo, npo_sequence])
def test_no_token_selected(loss):
    """u below every reward: sum 0 with a zero gradient, count 0; never a division, never NaN."""
    inputs = rejected([-1.0, -2.0], [0, 0], [0, 1], reference=-1.5)
    output = loss(inputs)
    assert float(output.sum.detach()) == 0.0
    assert (int(output.count), int(output.tokens)) == (0, 0)
    [gradient] = torch.autograd.grad(output.sum, inputs.policy)
    assert gradient.tolist() == [0.0, 0.0]
    assert all(math.isfinite(float(total)) for total, _ in output.metrics.values())


@pytest.mark.parametrize("loss", [npo, npo_sequence])
def test_stays_finite_far_out(loss):
    """A log-ratio of +-2,000 neither overflows nor loses its gradient's limit (beta, and 0)."""
    inputs = rejected([2000.0, -2000.0], [1, 1], [0, 1])
    output = loss(inputs, beta=0.1)
    [gradient] = torch.autograd.grad(output.sum, inputs.policy)
    assert float(output.sum.detach()) == pytest.approx(200.0)
    assert gradient.tolist() == pytest.approx([0.1, 0.0])
