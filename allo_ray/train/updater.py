"""How gradients become new values: the interface of the loop, and plain torch behind it.

The loop adds up gradients of loss *sums* over the micro-batches of a global batch and hands the divisor (instances or
weighted tokens of the global batch) over at the end: so the update does not depend on how the batch is cut, even where
the number of weighted tokens is known only after the last forward pass.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import nn

from allo_ray.config.train import TrainConfig
from allo_ray.neurons.parametrize import Neurons
from allo_ray.train.batching import Packed

#: The optimizer's state per tensor, besides the values themselves.
MOMENTS = ("exp_avg", "exp_avg_sq")


class Updater(Protocol):
    """Owns the policy, the optimizer, and the way to the other workers."""

    neurons: Neurons

    def forward(self, batch: Packed) -> torch.Tensor:
        """Log-probs [R] float32 of a micro-batch."""
        ...

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the gradient of a loss sum; `last` closes the global batch."""
        ...

    def update(self, divisor: float, lr: float) -> float:
        """Divides the gradient summed over all workers, clips it, steps, writes the values into the weights.

        Returns:
            The gradient norm over the selected neurons before clipping. If it is not finite nothing was changed.
        """
        ...

    def state(self) -> dict[str, torch.Tensor] | None:
        """Values and moments by tensor, float32 [K_t] on the CPU, the same for every sharding; None but on rank 0.

        Collective: every worker has to call it. Keys are "<tensor>.values", "<tensor>.exp_avg", ...; "step" counts the
        optimizer's steps.
        """
        ...

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Continues from what `state` gave, on any number of workers and any sharding."""
        ...


def make_optimizer(neurons: Neurons, config: TrainConfig) -> torch.optim.AdamW:
    """Stock AdamW over the values: moments, decay and step are of size K.

    Dense training takes the fused kind, which makes one pass instead of ten. On the CPU that kind rounds the last few
    entries of a tensor in another way, so selected neurons would not keep the bits of AdamW on the whole tensor.
    """
    return torch.optim.AdamW(
        neurons.parameters(),
        lr=config.lr,
        betas=config.adam_betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=neurons.selection.dense,
    )


def clipped_step(optimizer: torch.optim.AdamW, divisor: float, clip: float | None, lr: float) -> float:
    """Steps with the gradients divided by `divisor` and clipped, unless their norm is not finite.

    Returns:
        The norm of the divided gradients before clipping.
    """
    (group,) = optimizer.param_groups
    gradients = [values.grad for values in group["params"] if values.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients)) / divisor
    if math.isfinite(norm):
        scale = divisor if clip is None else divisor * max(1.0, (norm + 1e-6) / clip)
        if group["fused"]:  # divides as it reads
            optimizer.grad_scale = torch.tensor(scale, device=gradients[0].device)  # type: ignore[attr-defined]
        else:
            for gradient in gradients:
                gradient.mul_(1.0 / scale)
        group["lr"] = lr
        optimizer.step()
    return norm


class PlainUpdater:
    """One process, plain torch."""

    def __init__(self, policy: nn.Module, neurons: Neurons, config: TrainConfig) -> None:
        self.policy = policy
        self.neurons = neurons
        self.clip = config.clip
        self.optimizer = make_optimizer(neurons, config)

    def forward(self, batch: Packed) -> torch.Tensor:
        return self.policy(batch)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    @torch.no_grad()
    def update(self, divisor: float, lr: float) -> float:
        norm = clipped_step(self.optimizer, divisor, self.clip, lr)
        if math.isfinite(norm):
            self.neurons.write()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, torch.Tensor]:
        out: dict[str, torch.Tensor] = {"step": torch.zeros((), dtype=torch.int64)}
        for name, values in self.neurons.named_values():
            kept: dict[str, Any] = self.optimizer.state.get(values, {})
            out[f"{name}.values"] = values.detach().cpu().clone()
            for moment in MOMENTS:
                if moment in kept:
                    out[f"{name}.{moment}"] = kept[moment].detach().cpu().clone()
            if "step" in kept:
                out["step"] = torch.as_tensor(int(kept["step"]))
        return out

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        for name, values in self.neurons.named_values():
            values.data.copy_(state[f"{name}.values"])
            if f"{name}.{MOMENTS[0]}" in state:
                self.optimizer.state[values] = {
                    "step": torch.tensor(float(state["step"])),
                    **{moment: state[f"{name}.{moment}"].to(values.device, copy=True) for moment in MOMENTS},
                }
        self.neurons.write()
