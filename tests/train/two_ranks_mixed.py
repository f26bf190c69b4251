"""One rank of two: what `two_ranks` does, then ZeRO with all that a run may mix it with: the optimizer's offload, bf16
weights, activations computed again in the backward pass, and neurons of one layer only.

python -m tests.train.two_ranks_mixed RANK PORT MODEL ROWS SELECTION OUT: as `two_ranks`, and more files in OUT.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef

from allo_ray import tables
from allo_ray.config.train import TrainerConfig
from allo_ray.neurons.parametrize import attach
from allo_ray.neurons.selection import Selection
from allo_ray.train import checkpoint
from allo_ray.train.batching import pack
from allo_ray.train.checkpoint import Progress
from allo_ray.train.forward import Policy, load_model
from allo_ray.train.loop import Plan, run
from allo_ray.train.rows import Row, rows_of
from allo_ray.train.zero import ZeroUpdater
from tests.train.two_ranks import CONFIG, main

Batches = list[list[Row]]


def mixed(rank: int, model: str, rows_file: str, selection: str, out: Path) -> None:
    rows = rows_of(tables.TRAIN_ROWS.read(rows_file))
    batches = [rows[at : at + 8] for at in range(0, len(rows), 8)]
    plan = Plan("masked_dpo", {"v": 0.3}, CONFIG, len(batches), 80, worker=rank, workers=2)
    every = Selection.load(selection)
    for stage in (1, 2, 3):
        offloaded(stage, model, every, plan, batches[2:], out)
    for stage in (0, 3):
        one_layer(stage, model, every, plan, batches[:2], out)
    outlived = {checkpointing: outlive(model, every, rows[:4], checkpointing) for checkpointing in (0, 1)}
    if rank == 0:
        (out / "outlived.json").write_text(json.dumps(outlived))


def offloaded(stage: int, model: str, selection: Selection, plan: Plan, batches: Batches, out: Path) -> None:
    """Goes on from OUT/step<stage>, which was left without offload: OUT/offloaded<stage>."""
    loaded = load_model(model, torch.float32)
    trainer = TrainerConfig.model_validate({"zero_stage": stage, "offload_optimizer": True})
    updater = ZeroUpdater(Policy(loaded), attach(loaded, selection), CONFIG, trainer)
    found, progress = checkpoint.load(out / f"step{stage}")
    updater.load(found)
    progress = run(updater, plan, batches, Progress(progress.step), torch.distributed.all_reduce)
    state = updater.state()
    if state is not None:
        checkpoint.save(out / f"offloaded{stage}", state, progress)


def one_layer(stage: int, model: str, selection: Selection, plan: Plan, batches: Batches, out: Path) -> None:
    """bf16 and checkpointing, neurons of the first layer alone, so the head is a plain frozen weight: OUT/mixed<stage>,
    and all weights, gathered, in OUT/weights<stage>.safetensors."""
    import deepspeed

    mine = {name: indices for name, indices in selection.indices.items() if ".layers.0." in name}
    config = CONFIG.model_copy(update={"dtype": "bfloat16"})
    loaded = load_model(model, torch.bfloat16, gradient_checkpointing=True)
    weights = dict(loaded.named_parameters())
    trainer = TrainerConfig.model_validate({"zero_stage": stage})
    neurons = attach(loaded, replace(selection, indices=mine))
    updater = ZeroUpdater(Policy(loaded), neurons, config, trainer)
    progress = run(updater, replace(plan, config=config), batches, Progress(), torch.distributed.all_reduce)
    state = updater.state()
    with deepspeed.zero.GatheredParameters(list(weights.values()), enabled=stage == 3):
        if state is not None:
            checkpoint.save(out / f"mixed{stage}", state, progress)
            whole = {name: weight.data.clone() for name, weight in weights.items()}
            save_file(whole, out / f"weights{stage}.safetensors")


def outlive(model: str, selection: Selection, rows: list[Row], checkpointing: int) -> list[int]:
    """Under ZeRO 3: bytes of gathered weights that outlive a forward pass, and bytes of all that it gathered."""
    loaded = load_model(model, torch.float32, gradient_checkpointing=bool(checkpointing))
    neurons = attach(loaded, selection)
    gathered: dict[StorageWeakRef, int] = {}

    def note(_module: torch.nn.Module, _inputs: object, weight: torch.Tensor) -> None:
        gathered[StorageWeakRef(weight.untyped_storage())] = weight.untyped_storage().nbytes()

    for tensor in neurons.attached:
        tensor.entries.register_forward_hook(note)
    updater = ZeroUpdater(Policy(loaded), neurons, CONFIG, TrainerConfig(zero_stage=3))
    loss = updater.forward(pack(rows, "pair")).sum()
    left = sum(size for storage, size in gathered.items() if not storage.expired())
    whole = sum(gathered.values())
    updater.backward(loss, last=True)
    return [left, whole]


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
    mixed(int(sys.argv[1]), *sys.argv[3:6], Path(sys.argv[6]))
