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
from allo_ray.neurons.handover import BlockGradient, block_node
from allo_ray.train.attention import ATTENTION, register
from allo_ray.train.batching import Packed
from allo_ray.train.fused import fuse

#: Bytes of float32 logits made at a time, and of bf16 probabilities kept for the backward pass at most: [U, V] is
#: never whole in memory however large the micro-batch.
CHUNK_BYTES, KEPT_BYTES = 1 << 25, 1 << 26
#: Bytes of a block of the head's gradient: small enough for a CPU's cache, large enough for a GPU's launches.
BLOCK_BYTES = {"cpu": 1 << 23, "cuda": 1 << 27}
#: Settings of model configs that change logits after the head, with the value that changes nothing.
_LOGIT_SETTINGS = {"final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0}


class _HeadLogProbs(torch.autograd.Function):
    """log softmax(h W^T + b)[target], in chunks of states.

    hidden [U, E], weight [V, E], bias [V] or None, targets [U] -> [U] float32. `node` (`handover.block_node`)
    takes the weight's gradient in blocks. Softmax is float32. The probabilities are kept in the weight's dtype as long
    as they fit into `KEPT_BYTES`; beyond that the backward pass computes them again, of the states to which a gradient
    comes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        chunk: int,
        node: Any,
    ) -> torch.Tensor:
        out = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        room = KEPT_BYTES // (weight.shape[0] * weight.element_size())
        kept: list[torch.Tensor] = []
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = functional.linear(hidden[part], weight, bias)
            best = logits.amax(-1)
            aimed = logits.gather(1, targets[part, None])[:, 0]
            probabilities = torch.softmax(logits, -1, dtype=torch.float32)
            # The largest probability is at least 1 / V, so its logarithm is exact where the target's might be log 0.
            out[part] = aimed.float() - best.float() + probabilities.amax(-1).log()
            if (start + chunk) <= room and any(ctx.needs_input_grad):
                kept.append(probabilities.to(weight.dtype))
        ctx.save_for_backward(hidden, weight, bias, targets, *kept)
        ctx.chunk, ctx.node = chunk, node
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, *kept = ctx.saved_tensors
        upstream = gradients[0]
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if for_hidden else None
        grad_weight = grad_bias = blocks = None
        if for_weight and ctx.node is not None:
            rows_of_block = max(
                1, BLOCK_BYTES[weight.device.type] // (weight.shape[1] * weight.element_size())
            )
            blocks = BlockGradient(ctx.node, weight, rows_of_block)
            grad_weight = blocks.whole
        # States without a gradient are left out of the products: those of tokens that the loss drops (q = 0), and of
        # tokens that both responses of a pair begin with, where it cancels out. On a GPU the host waits here for the
        # forward pass, once a micro-batch; that is less than the products of the states left out.
        alive = (upstream != 0).cpu()
        for number, start in enumerate(range(0, hidden.shape[0], ctx.chunk)):
            part = alive[start : start + ctx.chunk]
            found = part.nonzero()[:, 0]
            if len(found) == 0:
                continue
            if len(found) == len(part):
                within, rows = slice(None), slice(start, start + ctx.chunk)
            else:
                within = found.to(hidden.device)
                rows = within + start
            states, gradient = hidden[rows], upstream[rows, None]
            if number < len(kept):
                slope = kept[number][within] * -gradient.to(weight.dtype)
            else:
                logits = functional.linear(states, weight, bias)
                slope = torch.softmax(logits, -1, dtype=torch.float32).mul_(-gradient).to(weight.dtype)
            # d log p[target] / d logits = onehot(target) - p
            slope.scatter_add_(1, targets[rows, None], gradient.to(slope.dtype))
            if grad_hidden is not None:
                grad_hidden[rows] = slope @ weight
            if blocks is not None:
                for block, of_rows in enumerate(slope.t().split(rows_of_block)):
                    blocks.add(block, of_rows @ states)
            elif for_weight:
                if grad_weight is None:
                    grad_weight = slope.t() @ states
                else:
                    grad_weight.addmm_(slope.t(), states)
            if for_bias:
                share = slope.sum(0)
                grad_bias = share if grad_bias is None else grad_bias.add_(share)
        # Zeros where nothing has a gradient: with None a worker would leave out its part of ZeRO's collective calls.
        if for_weight and grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        if for_bias and grad_bias is None:
            grad_bias = torch.zeros_like(bias)
        return grad_hidden, grad_weight, grad_bias, None, None, None


class Policy(nn.Module):
    """A causal language model that answers log-probs of a packed micro-batch.

    Wraps the transformers model as a submodule, so that DeepSpeed's hooks on its parts work.
    """

    def __init__(self, model: nn.Module, chunk: int | None = None) -> None:
        super().__init__()
        self.model = model
        #: States a head call sees at a time; None derives it from `CHUNK_BYTES`.
        self.chunk = chunk

    def forward(self, batch: Packed) -> torch.Tensor:
        """Returns log-probs [R] float32, nats; a token of weight zero gets its reference, without a gradient."""
        model: Any = self.model
        states = model.base_model(
            input_ids=batch.tokens[None], position_ids=batch.positions[None], use_cache=False, grid=batch.grid
        ).last_hidden_state[0]
        head = model.get_output_embeddings()
        # One access: where the weight is parametrized, each makes a node of its own in the graph.
        weight = head.weight
        chunk = self.chunk or max(1, CHUNK_BYTES // (4 * weight.shape[0]))
        hidden = states.index_select(0, batch.states)
        if len(batch.states) == 0:
            # No token of weight: still part of the graph, so that every worker takes the same collective calls.
            return batch.reference + hidden.float().sum() * 0.0
        bias = getattr(head, "bias", None)
        answers = _HeadLogProbs.apply(hidden, weight, bias, batch.targets, chunk, block_node(weight))
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
    fuse(model)
    model.eval()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        # transformers recomputes in training mode only; dropout, which that mode would bring, is taken out.
        for module in model.train().modules():
            for setting in ("p", "attention_dropout"):
                if isinstance(getattr(module, setting, None), float):
                    setattr(module, setting, 0.0)
    return model
