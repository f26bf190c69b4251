"""What every loss takes and gives.

Shapes: R response tokens of a micro-batch, S sequences (responses) in it, P = S / 2 pairs. Log-probs are nats.
A loss returns sums, never means: the loop divides by the counts of the whole global batch, so that a gradient does not
depend on how the batch was cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """The response tokens of a micro-batch.

    Attributes:
        policy: float32 [R], log-probs under the trained model; carries the gradient.
        reference: float32 [R], log-probs under the reference; not read by losses that need none.
        weight: float32 [R]; 0 leaves a token out.
        sequence: int64 [R], which sequence a token belongs to, in 0..S-1. For paired methods sequence 2i is the
            chosen response of pair i and 2i + 1 its rejected one; for one-sided methods each sequence is an instance.
        sequences: S.
    """

    policy: Tensor
    reference: Tensor
    weight: Tensor
    sequence: Tensor
    sequences: int

    @property
    def logratio(self) -> Tensor:
        """float32 [R]: log of policy over reference, token by token."""
        return self.policy - self.reference

    def per_sequence(self, tokens: Tensor) -> Tensor:
        """Sums of a [R] tensor over each sequence, [S]."""
        return tokens.new_zeros(self.sequences).index_add(0, self.sequence, tokens)

    def lengths(self) -> Tensor:
        """float32 [S]: response tokens of each sequence, whatever their weight."""
        return self.per_sequence(torch.ones_like(self.weight))


@dataclass(frozen=True)
class LossOutput:
    """A micro-batch's part of the global batch's loss.

    Attributes:
        sum: scalar with gradient, the sum over instances.
        count: instances (pairs, or sequences with a weighted token).
        tokens: tokens with a weight other than 0.
        metrics: name -> (sum, count), to be added over micro-batches and divided.
    """

    sum: Tensor
    count: Tensor | int
    tokens: Tensor | int
    metrics: dict[str, tuple[Tensor, Tensor | int]] = field(default_factory=dict)


def pair_output(
    inputs: LossInputs, losses: Tensor, chosen: Tensor, rejected: Tensor, weight: Tensor, beta: float
) -> LossOutput:
    """The output of a paired method.

    Args:
        losses: [P].
        chosen, rejected: [P], the scores whose difference the method widens; log-ratios where there is a reference.
        weight: [R], the token weights that were used.
        beta: what the margin is scaled with.
    """
    pairs = inputs.sequences // 2
    is_rejected = inputs.sequence % 2 == 1
    weighted = weight != 0
    difference = (chosen - rejected).detach()
    return LossOutput(
        sum=losses.sum(),
        count=pairs,
        tokens=weighted.sum(),
        metrics={
            "chosen_logratio": (chosen.detach().sum(), pairs),
            "rejected_logratio": (rejected.detach().sum(), pairs),
            "margin": (beta * difference.sum(), pairs),
            "accuracy": ((difference > 0).sum(), pairs),
            "kept": ((weighted & is_rejected).sum(), is_rejected.sum()),
        },
    )


def pair_scores(inputs: LossInputs, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of [R] token scores over the chosen and over the rejected response of each pair, each [P]."""
    sums = inputs.per_sequence(tokens)
    return sums[0::2], sums[1::2]
