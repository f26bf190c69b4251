"""The policy's forward pass: packed tokens -> log-probs of response tokens, the head only where a loss needs it.

Shapes: T packed tokens, U states that predict, E hidden size, V vocabulary, R response tokens. Log-probs are float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from allo_ray.errors import UserError
from allo_ray.train.attention import ATTENTION, register
from allo_ray.train.batching import Packed

#: Logits held at a time, bytes at four a logit: bounds memory whatever the batch.
HEAD_BYTES = 1 << 27
#: Settings of model configs that change logits after the head, with the value that changes nothing.
_LOGIT_SETTINGS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


class _HeadLogProbs(torch.autograd.Function):
    """log softmax(h W^T + b)[target] for chunks of states; keeps h and the log-sum-exp, recomputes the logits.

    hidden [U, E], weight [V, E], bias [V] or None, targets [U] -> [U] float32. Sums over V are taken in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        chunk: int,
    ) -> torch.Tensor:
        out = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        total = torch.empty_like(out)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = functional.linear(hidden[part], weight, bias).float()
            torch.logsumexp(logits, dim=-1, out=total[part])
            out[part] = logits.gather(1, targets[part, None])[:, 0] - total[part]
        ctx.save_for_backward(hidden, weight, bias, targets, total)
        ctx.chunk = chunk
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, total = ctx.saved_tensors
        upstream = gradients[0]
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if for_hidden else None
        grad_weight = grad_bias = None
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = functional.linear(hidden[part], weight, bias).float()
            # d log p[target] / d logits = onehot(target) - p
            slope = torch.exp_(logits.sub_(total[part, None])).neg_()
            slope.scatter_add_(
                1, targets[part, None], torch.ones_like(targets[part, None], dtype=slope.dtype)
            )
            slope = slope.mul_(upstream[part, None]).to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[part])
            if for_weight:
                share = slope.t() @ hidden[part]
                grad_weight = share if grad_weight is None else grad_weight.add_(share)
            if for_bias:
                share = slope.sum(0)
                grad_bias = share if grad_bias is None else grad_bias.add_(share)
        return grad_hidden, grad_weight, grad_bias, None, None


class Policy(nn.Module):
    """A causal language model that answers log-probs of a packed micro-batch.

    Wraps the transformers model as a submodule, so that DeepSpeed's hooks on its parts work.
    """

    def __init__(self, model: nn.Module, chunk: int | None = None) -> None:
        super().__init__()
        self.model = model
        #: States a head call sees at a time; None derives it from `HEAD_BYTES`.
        self.chunk = chunk

    def forward(self, batch: Packed) -> torch.Tensor:
        """Returns log-probs [R] float32, nats; a token of weight zero gets its reference, without a gradient."""
        model: Any = self.model
        states = model.base_model(
            input_ids=batch.tokens[None], position_ids=batch.positions[None], use_cache=False, grid=batch.grid
        ).last_hidden_state[0]
        head = model.get_output_embeddings()
        chunk = self.chunk or max(1, HEAD_BYTES // (4 * head.weight.shape[0]))
        hidden = states.index_select(0, batch.states)
        if len(batch.states) == 0:
            # No token of weight: still part of the graph, so that every worker takes the same collective calls.
            return batch.reference + hidden.float().sum() * 0.0
        answers = _HeadLogProbs.apply(hidden, head.weight, getattr(head, "bias", None), batch.targets, chunk)
        headless = batch.source < 0
        picked = answers.index_select(0, batch.source.clamp(min=0))
        return torch.where(headless, batch.reference, picked)


def load_model(
    folder: str | Path,
    dtype: torch.dtype,
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Loads a causal language model for training: weights in `dtype`, tree attention, no dropout, no cache.

    Raises:
        UserError: the model changes its logits after the head in a way that is not built here.
    """
    from transformers import AutoModelForCausalLM

    register()
    model = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=trust_remote_code
    )
    for setting, neutral in _LOGIT_SETTINGS.items():
        if getattr(model.config, setting, neutral) not in (None, neutral):
            raise UserError(
                f"{folder}: config.json sets '{setting}', which training does not build. Take another model."
            )
    model.config.use_cache = False
    model.eval()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers recomputes in training mode only; dropout, which that mode would bring, is taken out.
        for module in model.train().modules():
            for setting in ("p", "attention_dropout"):
                if isinstance(getattr(module, setting, None), float):
                    setattr(module, setting, 0.0)
    return model
