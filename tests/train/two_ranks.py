"""One rank of two: a few steps of masked DPO under each ZeRO stage, and once more from a checkpoint.

Before the first step a global batch whose gradient is not finite, and after the last one whose loss is not: both ranks
name the rows, also those that only the other one has seen. An error of one is raised by both.

python -m tests.train.two_ranks RANK PORT MODEL ROWS SELECTION OUT: rank 0 writes OUT/zero<stage>.safetensors.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from allo_ray import tables
from allo_ray.config.train import TrainConfig, TrainerConfig
from allo_ray.errors import UserError
from allo_ray.neurons.handover import BlockGradient
from allo_ray.neurons.parametrize import attach
from allo_ray.neurons.selection import Selection
from allo_ray.train import checkpoint
from allo_ray.train.checkpoint import Progress
from allo_ray.train.forward import Policy, load_model
from allo_ray.train.loop import Plan, run
from allo_ray.train.process import peak_rss
from allo_ray.train.rows import Row, micro_batches, rows_of
from allo_ray.train.worker import _on_all
from allo_ray.train.zero import ZeroUpdater
from tests.train.conftest import overflowing

CONFIG = TrainConfig(lr=1e-3, batch_size=8, dtype="float32", weight_decay=0.1)


def main(rank: int, port: str, model: str, rows_file: str, selection: str, target: str) -> None:
    out = Path(target)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rows = rows_of(tables.TRAIN_ROWS.read(rows_file))
    batches = [rows[at : at + 8] for at in range(0, len(rows), 8)]
    plan = Plan("masked_dpo", {"v": 0.3}, CONFIG, len(batches), 80, worker=rank, workers=2)

    def build(stage: int) -> ZeroUpdater:
        loaded = load_model(model, torch.float32)
        neurons = attach(loaded, Selection.load(selection))
        return ZeroUpdater(
            Policy(loaded), neurons, CONFIG, TrainerConfig.model_validate({"zero_stage": stage})
        )

    def add_up(sums: torch.Tensor) -> None:
        torch.distributed.all_reduce(sums)

    def refuses(what: str, updater: ZeroUpdater, broken: dict[str, Row], **args: float) -> None:
        """The first batch with these rows in it is refused by this rank, in the names of these rows alone."""
        batch = [broken.get(row.id, row) for row in batches[0]]
        names = ", ".join(row.id for row in batch if row.id in broken)
        with pytest.raises(UserError, match=rf"the {what} is not finite at the rows {names}\. Nothing was"):
            run(updater, replace(plan, loss_args={"v": 0.3, **args}), [batch], Progress(), add_up)

    # The longest row of each rank's share.
    first, second = (micro_batches(batches[0], "pair", 2, at, 80)[0][0] for at in range(2))

    blocks = []
    init = BlockGradient.__init__
    BlockGradient.__init__ = lambda self, *args: (blocks.append(args), init(self, *args))[1]  # type: ignore[method-assign]
    for stage in range(4):
        updater = build(stage)
        refuses("gradient", updater, {row.id: overflowing(row) for row in (first, second)}, beta=100.0)
        refuses("gradient", updater, {second.id: overflowing(second)}, beta=100.0)
        if stage == 3:
            sharded = [tensor.weight.ds_tensor.numel() for tensor in updater.neurons.attached]  # type: ignore[attr-defined]
            whole = [updater.neurons.selection.size_of(tensor.name) for tensor in updater.neurons.attached]
            assert all(part <= -(-size // 2) for part, size in zip(sharded, whole, strict=True))
        torch.ones(rank << 28, dtype=torch.uint8)  # 256 MiB on rank 1, gone at once
        blocks.clear()
        reached = run(updater, plan, batches[:2], Progress(), add_up)
        assert blocks, "the head's gradient came whole"
        told = reached.metrics[-1]
        assert told["tokens_per_second"] == told["tokens"] / told["seconds"] > 0
        own = peak_rss()
        assert rank == 1 or told["peak_rss"] > own + (100 << 20), "rank 1 has held more"
        state = updater.state()
        folder = out / f"step{stage}"
        if state is not None:
            checkpoint.save(folder, state, reached)
        torch.distributed.barrier()
        found, progress = checkpoint.load(folder)
        resumed = build(stage)
        resumed.load(found)
        for name, one in (("zero", updater), ("resumed", resumed)):
            run(one, plan, batches[2:], Progress(progress.step, 0, []), add_up)
            state = one.state()
            if state is not None:
                checkpoint.save(out / f"{name}{stage}", state, progress)

    def fails() -> None:
        if rank == 1:
            raise UserError("on rank 1 alone")

    with pytest.raises(UserError, match="on rank 1 alone"):
        _on_all(fails)
    assert _on_all(lambda: rank) == rank
    lost = np.full(len(second.chosen), np.nan, dtype=np.float32)
    refuses("loss", updater, {second.id: replace(second, chosen_reference=lost)})


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
