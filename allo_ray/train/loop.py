"""The training loop: plain torch, no Ray, no DeepSpeed. One loop for every method.

Shapes: B instances of a global batch, R response tokens of a micro-batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from allo_ray.config.train import TrainConfig
from allo_ray.errors import UserError
from allo_ray.losses.base import LossInputs, LossOutput
from allo_ray.losses.registry import LOSSES
from allo_ray.train.batching import Packed, pack
from allo_ray.train.checkpoint import Progress
from allo_ray.train.process import peak_rss
from allo_ray.train.rows import Row, Side, micro_batches
from allo_ray.train.updater import Updater

#: Means over the instances (or tokens) of a global batch that losses may report; columns of METRICS.
REPORTED = ("chosen_logratio", "rejected_logratio", "margin", "accuracy", "kept")


@dataclass(frozen=True)
class Plan:
    """What is trained, apart from the model.

    Attributes:
        loss: name in `losses.registry.LOSSES`, with its hyper-parameters.
        steps: global batches of the whole run, from which the schedule follows.
        worker, workers: this process and how many there are.
        micro_batch_tokens: see `rows.micro_batches`.
        checkpoint_every: global batches between two calls of `save`; 0: none.
        own_reference: the reference log-probs are those of the model that training starts from.
    """

    loss: str
    loss_args: dict[str, Any]
    config: TrainConfig
    steps: int
    micro_batch_tokens: int
    worker: int = 0
    workers: int = 1
    checkpoint_every: int = 0
    own_reference: bool = True
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def arguments(self, step: int) -> dict[str, Any]:
        """Hyper-parameters of the loss at a step.

        At the first one all ratios of Eq. 8 are equal where the reference is the start itself, so nothing is dropped;
        the rounding of a reference pass with another packing must not choose tokens in their place.
        """
        if step == 0 and self.own_reference and "v" in self.loss_args:
            return self.loss_args | {"v": 0.0}
        return self.loss_args

    @property
    def side(self) -> Side:
        """Which responses the loss reads."""
        return LOSSES[self.loss].side


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Rate of step `step` (from 0) of `steps`: linear warm-up to `lr`, which it first has at the last warm-up step,
    then a half cosine that would reach 0 at step `steps`."""
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def run(
    updater: Updater,
    plan: Plan,
    batches: Iterable[list[Row]],
    progress: Progress,
    add_up: Callable[[torch.Tensor], None] = lambda sums: None,
    on_step: Callable[[Progress], None] = lambda progress: None,
    save: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Trains on global batches from `progress.step` on and returns where it ended.

    Args:
        batches: global batches, the first being number `progress.step`, with all rows, also other workers'.
        add_up: adds a float64 tensor over the workers, in place.
        on_step: called after each step.
        save: called every `plan.checkpoint_every` steps, not after the last.

    Raises:
        UserError: a loss or gradient is not finite; names the rows. Raised by every worker, before the values change.
    """
    waiting = _prepared(batches, plan)
    for rows, packed in waiting:
        started = time.monotonic()
        lr = learning_rate(plan.config, progress.step, plan.steps)
        if packed is None:
            progress.skipped += 1
            row: dict[str, Any] = dict.fromkeys(("loss", "grad_norm", *REPORTED)) | {"tokens": 0}
        else:
            row = _step(updater, plan, rows, packed, lr, progress.step, add_up)
        seconds = time.monotonic() - started
        speed = {"seconds": seconds, "tokens_per_second": row["tokens"] / seconds}
        progress.metrics.append({"step": progress.step, "lr": lr, **row, **speed, **_peaks(plan, add_up)})
        progress.step += 1
        on_step(progress)
        if (
            plan.checkpoint_every
            and progress.step % plan.checkpoint_every == 0
            and progress.step < plan.steps
        ):
            save(progress)
    return progress


def _prepared(
    batches: Iterable[list[Row]], plan: Plan
) -> Iterator[tuple[list[Row], list[Packed | None] | None]]:
    """Packs this worker's share; None in the place of a batch without a weighted token in any worker's share."""
    for rows in batches:
        if not any(row.weighted(plan.side) for row in rows):
            yield rows, None
            continue
        yield rows, _share(rows, plan, plan.micro_batch_tokens)


def _share(rows: list[Row], plan: Plan, budget: int) -> list[Packed | None]:
    """This worker's micro-batches of a global batch; None in the place of one without rows."""
    mine = micro_batches(rows, plan.side, plan.workers, plan.worker, budget)
    return [pack(part, plan.side) if part else None for part in mine]


def _step(
    updater: Updater,
    plan: Plan,
    rows: list[Row],
    parts: list[Packed | None],
    lr: float,
    step: int,
    add_up: Callable[[torch.Tensor], None],
) -> dict[str, Any]:
    sums = torch.zeros(5 + 2 * len(REPORTED), dtype=torch.float64)
    broken: list[str] = []
    for part, policy, output in _passes(updater, plan, rows, parts, step):
        if not math.isfinite(output.sum.item()):
            broken += _blame(part, policy, plan.side)
            sums[4] = 1
        _count(sums, output, part)
    add_up(sums)
    loss_sum, count, tokens, read, failed = sums[:5].tolist()
    if failed:
        raise UserError(_not_finite("loss", step, _of_all_workers(broken, rows, add_up), lr))
    divisor = count if plan.config.normalize == "instances" else tokens
    norm = updater.update(divisor, lr)
    if not math.isfinite(norm):
        broken = _broken_gradients(updater, plan, rows, step)
        raise UserError(_not_finite("gradient", step, _of_all_workers(broken, rows, add_up), lr))
    means = {
        name: total / number if number else None
        for name, total, number in zip(REPORTED, sums[5::2].tolist(), sums[6::2].tolist(), strict=True)
    }
    return {"loss": loss_sum / divisor, "grad_norm": norm, **means, "tokens": int(read)}


def _passes(
    updater: Updater, plan: Plan, rows: list[Row], parts: list[Packed | None], step: int
) -> Iterator[tuple[Packed, torch.Tensor, LossOutput]]:
    """Forward and backward of each micro-batch; gives it, its log-probs [R] and its loss after both.

    The backward pass takes place whatever the loss is, and a worker without rows takes part with a row whose loss
    counts nothing, which is not given: the other workers wait in the collective calls.
    """
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part is None:
            idle = pack(rows[:1], plan.side).to(plan.device)
            updater.backward(updater.forward(idle).sum() * 0.0, last)
            continue
        part = part.to(plan.device)
        policy = updater.forward(part)
        inputs = LossInputs(
            policy=policy,
            reference=part.reference,
            weight=part.weight,
            sequence=part.sequence,
            sequences=part.sequences,
        )
        output = LOSSES[plan.loss].function(inputs, **plan.arguments(step))
        updater.backward(output.sum, last)
        yield part, policy, output


def _count(sums: torch.Tensor, output: LossOutput, part: Packed) -> None:
    """sums: loss, instances, weighted tokens, tokens read, broken, then (total, number) of each reported metric."""
    sums[:4] += torch.tensor(
        [float(output.sum.detach()), float(output.count), float(output.tokens), len(part.tokens)],
        dtype=torch.float64,
    )
    for at, name in enumerate(REPORTED):
        if name in output.metrics:
            total, number = output.metrics[name]
            sums[5 + 2 * at] += float(total)
            sums[6 + 2 * at] += float(number)


def _peaks(plan: Plan, add_up: Callable[[torch.Tensor], None]) -> dict[str, int | None]:
    """The most memory that any worker has held so far, bytes."""
    gpu = plan.device.type == "cuda"
    # A sum over the workers in which each has columns of its own: the maximum without another kind of call.
    held = torch.zeros(2, plan.workers, dtype=torch.float64)
    held[0, plan.worker] = peak_rss()
    held[1, plan.worker] = torch.cuda.max_memory_allocated(plan.device) if gpu else 0
    add_up(held)
    rss, allocated = held.amax(1).tolist()
    return {"peak_rss": int(rss), "peak_gpu": int(allocated) if gpu else None}


def _blame(part: Packed, policy: torch.Tensor, side: Side) -> list[str]:
    """Ids of the rows whose log-probs or references are not finite; all of them if it is none of these."""
    bad = ~(policy.detach().isfinite() & part.reference.isfinite() & part.weight.isfinite())
    numbers = part.sequence[bad].unique().tolist()
    found = sorted({number // 2 if side == "pair" else number for number in numbers})
    return [part.ids[at] for at in found] or list(part.ids)


def _broken_gradients(updater: Updater, plan: Plan, rows: list[Row], step: int) -> list[str]:
    """Ids of this worker's rows whose own gradient is not finite: each row goes through the model alone.

    Every worker has to call it. The values stay, and what is looked at is not added up.
    """
    norms: list[torch.Tensor] = []

    def look(gradient: torch.Tensor) -> torch.Tensor:
        norms.append(torch.linalg.vector_norm(gradient))
        return torch.zeros_like(gradient)

    # These hooks see the worker's own gradient, before ZeRO sums and shards it.
    hooks = [values.register_hook(look) for values in updater.neurons.parameters()]
    broken: list[str] = []
    rows = [row for row in rows if row.weighted(plan.side)]
    for part, _, _ in _passes(updater, plan, rows, _share(rows, plan, budget=1), step):
        if not torch.stack(norms).isfinite().all():
            broken += part.ids
        norms.clear()
    for hook in hooks:
        hook.remove()
    return broken


def _of_all_workers(ids: list[str], rows: list[Row], add_up: Callable[[torch.Tensor], None]) -> list[str]:
    """The ids that any worker found, in the order of the global batch, which all workers know; all where none did."""
    found = torch.tensor([row.id in ids for row in rows], dtype=torch.float64)
    add_up(found)
    named = [row.id for row, times in zip(rows, found.tolist(), strict=True) if times]
    return named or [row.id for row in rows]


def _not_finite(what: str, step: int, ids: list[str], lr: float) -> str:
    shown = ", ".join(ids[:16]) + (f" and {len(ids) - 16} more" if len(ids) > 16 else "")
    return (
        f"step {step}: the {what} is not finite at the rows {shown}. Nothing was changed. Look at these rows, "
        f"lower the learning rate ({lr:.3g} now), or train in float32."
    )
