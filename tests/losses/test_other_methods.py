"""The methods that the paper compares with, each against its formula worked out by hand, and SimPO against TRL."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from allo_ray.errors import UserError
from allo_ray.losses.base import LossInputs
from allo_ray.losses.registry import LOSSES

#: One pair: chosen log-ratios 1 and 3 (sum 4, mean 2), rejected log-ratio -1; log-probs equal them.
PAIR = LossInputs(
    torch.tensor([1.0, 3.0, -1.0], requires_grad=True),
    torch.zeros(3),
    torch.ones(3),
    torch.tensor([0, 0, 1]),
    sequences=2,
)


def softplus(x: float) -> float:
    """-log sigmoid(-x)."""
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("sft", {}, -(1 + 3 - 1)),
        ("dpo", {"beta": 0.1}, softplus(-0.1 * 5)),
        ("rdpo", {"beta": 0.1, "alpha": 0.2}, softplus(-(0.1 * 5 + 0.2 * (2 - 1)))),
        ("ipo", {"beta": 0.1}, (2 - -1 - 1 / 0.2) ** 2),
        ("bco", {"beta": 0.1}, softplus(-0.1 * 4) + softplus(0.1 * -1)),
        ("ppo", {"clip": 0.2}, -(1.2 + 1.2 - 0.8)),
        ("simpo", {"beta": 2.0, "gamma": 1.0}, softplus(-(2.0 * 3 - 1.0))),
    ],
)
def test_by_hand(name: str, args: dict[str, float], expected: float):
    assert float(LOSSES[name].function(PAIR, **args).sum.detach()) == pytest.approx(expected, abs=1e-6)


def test_simpo_is_trls():
    """TRL's CPOTrainer.cpo_loss on mean log-probs; gradients too."""
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    told = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        simpo_gamma=0.5,
        label_smoothing=0.0,
        loss_type="simpo",
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs = trainer.cpo_loss(told, PAIR.policy[:2].mean()[None], PAIR.policy[2:].mean()[None])[0].sum()
    ours = LOSSES["simpo"].function(PAIR, beta=2.0, gamma=0.5).sum
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    [expected] = torch.autograd.grad(theirs, PAIR.policy)
    torch.testing.assert_close(torch.autograd.grad(ours, PAIR.policy)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(LOSSES))
def test_needs_what_it_says(name: str):
    """A loss without reference gives the same whatever stands there, one with a reference does not."""
    # Ratios of 1.1, e and 0.9: within what PPO clips, or the clipped terms would be the same.
    other = LossInputs(PAIR.policy, torch.tensor([0.9, 2.0, -0.9]), PAIR.weight, PAIR.sequence, 2)
    spec = LOSSES[name]
    same = float(spec.function(PAIR).sum.detach()) == float(spec.function(other).sum.detach())
    assert same is not spec.needs_reference


@pytest.mark.parametrize("name", list(LOSSES))
def test_finite_without_any_weight(name: str):
    """All weights 0, and a sequence without a token: sums and gradients stay finite."""
    policy = torch.tensor([-1.0, -2.0], requires_grad=True)
    inputs = LossInputs(policy, torch.zeros(2), torch.zeros(2), torch.tensor([0, 0]), sequences=2)
    output = LOSSES[name].function(inputs)
    output.sum.backward()
    assert policy.grad is not None
    assert torch.isfinite(policy.grad).all()
    assert int(output.tokens) == 0


def test_unknown_argument():
    with pytest.raises(UserError, match=r"loss dpo has no argument gamma; it has: beta\."):
        LOSSES["dpo"].check({"beta": 0.1, "gamma": 1})
