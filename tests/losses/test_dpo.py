"""Golden values and parity with TRL for the paired losses on the policy's and the reference's log-probs."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from allo_ray.losses.base import LossInputs
from allo_ray.losses.dpo import dpo, masked_dpo
from allo_ray.losses.registry import LOSSES


def pairs(lengths: list[tuple[int, int]], seed: int = 0, scale: float = 1.0) -> LossInputs:
    """Random log-probs for pairs of responses of these lengths; weight 1."""
    random = torch.Generator().manual_seed(seed)
    flat = [length for pair in lengths for length in pair]
    sequence = torch.repeat_interleave(torch.arange(len(flat)), torch.tensor(flat))
    policy = -scale * torch.rand(len(sequence), generator=random)
    reference = -scale * torch.rand(len(sequence), generator=random)
    return LossInputs(
        policy.requires_grad_(), reference, torch.ones(len(sequence)), sequence, sequences=len(flat)
    )


@pytest.mark.parametrize("name", ["dpo", "masked_dpo"])
def test_first_step_is_ln_2(name: str):
    """At the first step policy = reference, the difference is 0, and -log sigmoid(0) = ln 2 for each pair."""
    inputs = pairs([(3, 5), (1, 40), (7, 2)])
    same = LossInputs(inputs.reference, inputs.reference, inputs.weight, inputs.sequence, 6)
    output = LOSSES[name].function(same)
    assert float(output.sum) / float(output.count) == pytest.approx(math.log(2), abs=1e-6)
    assert int(output.tokens) == 58


def test_by_hand():
    """beta 0.5; chosen log-ratio 0.2 + 0.4 = 0.6, rejected -0.1: -log sigmoid(0.5 * 0.7) = log(1 + e^-0.35)."""
    inputs = LossInputs(
        torch.tensor([-1.0, -1.0, -2.0]),
        torch.tensor([-1.2, -1.4, -1.9]),
        torch.ones(3),
        torch.tensor([0, 0, 1]),
        sequences=2,
    )
    output = dpo(inputs, beta=0.5)
    assert float(output.sum) == pytest.approx(math.log1p(math.exp(-0.35)), abs=1e-6)
    metrics = {name: float(total) / float(count) for name, (total, count) in output.metrics.items()}
    expected = {"chosen_logratio": 0.6, "rejected_logratio": -0.1, "margin": 0.35, "accuracy": 1, "kept": 1}
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_v_0_is_dpo():
    inputs = pairs([(3, 5), (1, 40), (7, 2)])
    torch.testing.assert_close(masked_dpo(inputs, v=0.0).sum, dpo(inputs).sum, rtol=0, atol=0)


def test_masked_dpo_drops_rejected_tokens_only():
    """v 0.5 of 4 rejected tokens drops the two with the highest ratios (3 and 2); the chosen ones all stay.

    Chosen 9 + 9 = 18, rejected 1 + 0 = 1: -log sigmoid(0.1 * 17); no gradient reaches the dropped tokens.
    """
    policy = torch.tensor([9.0, 9.0, 3.0, 1.0, 2.0, 0.0], requires_grad=True)
    inputs = LossInputs(policy, torch.zeros(6), torch.ones(6), torch.tensor([0, 0, 1, 1, 1, 1]), sequences=2)
    output = masked_dpo(inputs, beta=0.1, v=0.5)
    assert float(output.sum.detach()) == pytest.approx(math.log1p(math.exp(-1.7)), abs=1e-6)
    assert int(output.tokens) == 4
    assert [float(part) for part in output.metrics["kept"]] == [2, 4]
    output.sum.backward()
    assert policy.grad is not None
    assert (policy.grad != 0).tolist() == [True, True, False, True, False, True]


def test_cut_into_micro_batches():
    """Sums and counts of the parts add up to those of the whole, so does the gradient."""
    lengths = [(3, 5), (1, 40), (7, 2), (6, 6)]
    whole = pairs(lengths)
    output = masked_dpo(whole)
    output.sum.backward()
    assert whole.policy.grad is not None
    policy = whole.policy.detach().clone().requires_grad_()
    total = torch.zeros(())
    for first in (0, 2):
        mine = (whole.sequence // 2 >= first) & (whole.sequence // 2 < first + 2)
        part = masked_dpo(
            LossInputs(
                policy[mine], whole.reference[mine], whole.weight[mine], whole.sequence[mine] - 2 * first, 4
            )
        )
        part.sum.backward()
        total += part.sum.detach()
    torch.testing.assert_close(total, output.sum.detach())
    torch.testing.assert_close(policy.grad, whole.policy.grad)


def trl_loss(inputs: LossInputs, kind: str, beta: float) -> torch.Tensor:
    """The loss of TRL's DPOTrainer on the same log-probs: its own `_compute_loss`, the trainer around it left out.

    Its batch is padded: chosen rows, then rejected rows; prompts of three tokens before them.
    """
    trainer = pytest.importorskip("trl").DPOTrainer
    sequences = [inputs.sequence == number for number in range(inputs.sequences)]
    sequences = sequences[0::2] + sequences[1::2]
    lengths = [int(mine.sum()) for mine in sequences]
    width, rows = 3 + max(lengths), len(sequences)
    mask = torch.tensor([[0] * 3 + [1] * length + [0] * (width - 3 - length) for length in lengths])
    log_probs = torch.stack(
        [
            torch.nn.functional.pad(inputs.policy[mine], (2, width - 3 - length))
            for mine, length in zip(sequences, lengths, strict=True)
        ]
    )
    reference = torch.stack([inputs.reference[mine].sum() for mine in sequences])
    zeros = torch.zeros_like(log_probs)
    gathered = SimpleNamespace(
        device="cpu", gather=lambda tensor: tensor, gather_for_metrics=lambda tensor: tensor.reshape(-1)
    )
    told = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=gathered,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[kind],
        loss_weights=[1.0],
        beta=beta,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    batch = {
        "input_ids": torch.ones(rows, width, dtype=torch.long),
        "attention_mask": torch.ones(rows, width),
        "completion_mask": mask,
        "ref_chosen_logps": reference[: rows // 2],
        "ref_rejected_logps": reference[rows // 2 :],
    }
    return trainer._compute_loss(told, lambda **kwargs: outputs, batch, return_outputs=False)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("dpo", "sigmoid"), ("masked_dpo", "sigmoid"), ("ipo", "ipo"), ("bco", "bco_pair")]
)
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_parity_with_trl(ours: str, theirs: str, scale: float):
    """Every pair's loss and its gradient to each token's log-prob agree with TRL's within 1e-5 (masked: v 0)."""
    args = {"beta": 0.1, "v": 0.0} if ours == "masked_dpo" else {"beta": 0.1}
    for number, lengths in enumerate([(3, 5), (1, 40), (7, 2), (90, 60)]):
        inputs = pairs([lengths], seed=number, scale=scale)
        output = LOSSES[ours].function(inputs, **args)
        [gradient] = torch.autograd.grad(output.sum, inputs.policy)
        expected = trl_loss(inputs, theirs, beta=0.1)
        [expected_gradient] = torch.autograd.grad(expected, inputs.policy)
        torch.testing.assert_close(output.sum, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5)


def test_mean_over_a_batch_is_trls():
    inputs = pairs([(3, 5), (1, 40), (7, 2), (90, 60)])
    output = dpo(inputs, beta=0.1)
    torch.testing.assert_close(
        output.sum / output.count, trl_loss(inputs, "sigmoid", 0.1), rtol=1e-5, atol=1e-5
    )
