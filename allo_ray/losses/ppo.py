"""PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347) on stored rollouts, without a value network.

The paper compares with "Vanilla PPO" and "PPO A2C" and gives no detail of either. Here both are one PPO iteration over
the stored responses: the backbone drew them, so the reference log-probs are those of the behaviour policy (exactly so
at temperature 1 and top_p 1, and for sampled, not human, responses), and the KL penalty of RLHF is 0 in their rewards.

- `ppo` knows the verdict alone, +1 or -1, which is already normalised within a pair: every token has it as its
  advantage. It is PPO with discount 1, lambda 1 and the pair's mean reward as the baseline.
- `ppo_a2c` is the same with an advantage of its own for each token. The paper's A2C learns a critic beside the policy;
  here the token reward model of 4.2 says which tokens of y- are to blame: -(1 - P_re). Tokens of y+ keep +1.
"""

from __future__ import annotations

import torch

from allo_ray.losses.base import LossInputs, LossOutput, pair_output, pair_scores

#: Log-ratios end here, so that a ratio stays finite; it is clipped long before, on the side where clipping is.
_LARGEST = 20.0


def ppo(inputs: LossInputs, clip: float = 0.2) -> LossOutput:
    """-sum_j min(ratio_j A_j, clamp(ratio_j, 1 - clip, 1 + clip) A_j) over the tokens of both responses of a pair.

    A_j is the token's weight, with a minus sign in the rejected response; ratio_j is policy over reference.

    Args:
        clip: how far from 1 a ratio may move a token's term.
    """
    sign = 1.0 - 2.0 * (inputs.sequence % 2)
    advantage = sign * inputs.weight
    ratio = inputs.logratio.clamp(max=_LARGEST).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    chosen, rejected = pair_scores(inputs, gain)
    ahead, behind = pair_scores(inputs, inputs.logratio * inputs.weight)
    return pair_output(inputs, -(chosen + rejected), ahead, behind, inputs.weight, beta=1.0)
