"""DeepSpeed behind the loop: ZeRO 0 to 3 over the values of the selected neurons.

Neither fp16 nor bf16 is enabled in its config: then DeepSpeed neither casts the module nor keeps half-precision copies,
so the frozen weights stay in their own dtype beside float32 values. ZeRO 1 and 2 shard the masters and moments of the
values, ZeRO 3 also the frozen weights.

Gradients are sums over workers and micro-batches. DeepSpeed averages over the W workers, and the divisor is known only
after the last backward pass: so its loss scale, which it divides the gradients by before clipping, is set to
divisor / W.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from allo_ray.config.train import TrainConfig, TrainerConfig
from allo_ray.neurons.parametrize import Neurons
from allo_ray.train.batching import Packed
from allo_ray.train.updater import MOMENTS, clipped_step, make_optimizer

#: Values whose gradients are reduced at a time.
BUCKET = 50_000_000


def stage_of(trainer: TrainerConfig, workers: int) -> int:
    """The ZeRO stage that is used: a single worker shards nothing, so copies made for sharding are left out."""
    return trainer.zero_stage if workers > 1 or trainer.offload_optimizer else 0


def engine_config(
    config: TrainConfig, trainer: TrainerConfig, workers: int, sizes: Sequence[int]
) -> dict[str, Any]:
    """The DeepSpeed config for values of the given sizes. Micro-batches are counted by the loop, not by DeepSpeed."""
    stage = stage_of(trainer, workers)
    # DeepSpeed's own bucket is a buffer of 2 GB, however few values there are; it has to hold the largest tensor.
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": max(*sizes, min(sum(sizes), BUCKET))}
    if stage == 3:
        # No tensor stays whole for being small; one that is used again within DeepSpeed's reuse distance, 1e9 neurons,
        # does until then, from the second step on. Gradients are sent from where they are: contiguous, they would
        # pass through a buffer as large as the bucket, which is never freed: 4 B for each value up to `BUCKET`.
        zero |= {"stage3_param_persistence_threshold": 0, "contiguous_gradients": False}
    if trainer.offload_optimizer:
        zero |= {"offload_optimizer": {"device": "cpu"}}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip if config.clip is not None and stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


class ZeroUpdater:
    """A DeepSpeed engine around the policy. Needs an initialised torch process group."""

    def __init__(
        self, policy: nn.Module, neurons: Neurons, config: TrainConfig, trainer: TrainerConfig
    ) -> None:
        deepspeed = _quiet_deepspeed()
        self.neurons = neurons
        self.clip = config.clip
        self.workers = torch.distributed.get_world_size()
        self.stage = stage_of(trainer, self.workers)
        self.worker = torch.distributed.get_rank()
        self.optimizer = make_optimizer(neurons, config)
        deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
        self.engine, *_ = deepspeed.initialize(
            model=policy,
            optimizer=self.optimizer,
            config=engine_config(config, trainer, self.workers, [v.numel() for v in neurons.parameters()]),
            dist_init_required=False,
        )
        self.engine.enable_backward_allreduce = self.workers > 1

    def forward(self, batch: Packed) -> torch.Tensor:
        return self.engine(batch)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        if self.stage > 0:
            self.engine.optimizer.override_loss_scale(1.0)
        self.engine.backward(loss)

    @torch.no_grad()
    def update(self, divisor: float, lr: float) -> float:
        if self.stage == 0:
            # DeepSpeed has averaged the gradients over the workers; its own step could not divide them.
            norm = clipped_step(self.optimizer, divisor / self.workers, self.clip, lr)
            self.engine.zero_grad()
            if math.isfinite(norm):
                self.neurons.write()
            return norm
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.optimizer.override_loss_scale(divisor / self.workers)
        self.engine.step()
        # DeepSpeed leaves everything as it was where the norm is not finite.
        if not self.engine.was_step_applied():
            return math.nan
        self._write()
        return float(self.engine.get_global_grad_norm())

    def _write(self) -> None:
        if self.stage < 3:
            self.neurons.write()
            return
        import deepspeed

        for tensor in self.neurons.attached:
            weight: Any = tensor.weight
            with deepspeed.zero.GatheredParameters([tensor.entries.values]):
                values = tensor.entries.values.data.clone()
            shard = weight.ds_tensor
            self.neurons.write_shard(tensor.name, values, shard.data.view(-1), self.worker * shard.ds_numel)

    def state(self) -> dict[str, torch.Tensor] | None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        out: dict[str, torch.Tensor] = {"step": torch.as_tensor(self._steps())}
        for name, values in self.neurons.named_values():
            if self.stage == 0:
                kept = self.optimizer.state.get(values, {})
                full = [values.detach(), *(kept.get(moment) for moment in MOMENTS)]
            else:
                moments = [
                    safe_get_full_optimizer_state(values, key) if self._steps() else None for key in MOMENTS
                ]
                full = [safe_get_full_fp32_param(values), *moments]
            if self.worker == 0:
                for key, tensor in zip(("values", *MOMENTS), full, strict=True):
                    if tensor is not None:
                        out[f"{name}.{key}"] = tensor.detach().reshape(-1).cpu().clone()
        return out if self.worker == 0 else None

    @torch.no_grad()
    def load(self, state: dict[str, torch.Tensor]) -> None:
        moved = bool(int(state["step"]))
        if moved:
            self._make_moments(float(state["step"]))
        for name, values in self.neurons.named_values():
            self._set(values, "values", state[f"{name}.values"])
            for moment in MOMENTS if moved else ():
                self._set(values, moment, state[f"{name}.{moment}"])
        if self.stage == 3:
            self._publish_masters()
        self._write()

    def _set(self, values: Any, key: str, whole: torch.Tensor) -> None:
        """Sets the master ("values") or a moment of one tensor, or this worker's part of it."""
        from deepspeed import utils

        whole = whole.to(values.device)
        if self.stage == 0:
            (values.data if key == "values" else self.optimizer.state[values][key]).copy_(whole)
        elif self.stage < 3:
            if key == "values":
                values.data.copy_(whole)
                utils.safe_set_full_fp32_param(values, whole)
            else:
                utils.safe_set_full_optimizer_state(values, whole, key)
        else:
            # DeepSpeed's setter of full tensors fails where the last worker's part is padded.
            size = values.ds_tensor.numel()
            padded = torch.nn.functional.pad(whole, (0, size * self.workers - len(whole)))
            part = padded[self.worker * size : (self.worker + 1) * size]
            if key == "values":
                utils.safe_set_local_fp32_param(values, part)
            else:
                utils.safe_set_local_optimizer_state(values, part, key)

    def _publish_masters(self) -> None:
        """ZeRO 3 keeps the masters beside the parameters' own shards: brings the latter up to date."""
        optimizer = self.engine.optimizer
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)

    def _flat(self) -> list[torch.Tensor]:
        """The tensors that the optimizer really steps on."""
        if self.stage == 0:
            return list(self.neurons.parameters())
        if self.stage == 3:
            return self.engine.optimizer.fp32_partitioned_groups_flat
        return self.engine.optimizer.single_partition_of_fp32_groups

    def _steps(self) -> int:
        kept: dict[str, Any] = self.optimizer.state.get(self._flat()[0], {})
        return int(kept["step"]) if "step" in kept else 0

    def _make_moments(self, step: float) -> None:
        for flat in self._flat():
            self.optimizer.state[flat] = {
                "step": torch.tensor(step),
                **{moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS},
            }
        if self.stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()


def _quiet_deepspeed() -> Any:
    """Imports DeepSpeed without its chatter and without its compiled shared-memory operator.

    The operator takes 20 s of g++ at first use and serves inference only.
    """
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    # Its autotuner, which nothing here uses, imports mlflow where that is installed: several seconds.
    hidden = [] if "mlflow" in sys.modules else ["mlflow"]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    import deepspeed
    import deepspeed.ops

    for name in hidden:
        del sys.modules[name]
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
