"""Bytes a neuron costs each rank while it trains: arithmetic beside what two ranks really hold.

    python -m benchmarks.memory --json FILE [--layers 8]

A random Llama in bf16, two ranks on gloo, ZeRO 0 to 3, k = 1, 5, 10, 20 and 100 %. Held are the distinct storages of
all tensors alive after the second backward pass, when gradients and moments are there; activations are gone by then.
Divided by the number of neurons, as is the arithmetic (bytes of each selected neuron; all of them carry 2 of bf16):

    4 value, 4 gradient, 8 moments, 4 index (none at 100 %)
    ZeRO 1, 2: value and index whole; a second master, its moments and its gradient halved by two ranks
    ZeRO 3: the bf16 weights, values, masters, moments and gradients halved; the index whole
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHARES = (0.01, 0.05, 0.1, 0.2, 1.0)
RANKS = 2


def arithmetic(k: float, stage: int) -> float:
    """Bytes a neuron of one rank of two."""
    index = 4 if k < 1 else 0
    if stage == 0:
        return 2 + k * (4 + 4 + 8 + index)
    if stage < 3:
        return 2 + k * (4 + index + (4 + 8 + 4) / RANKS)
    return 2 / RANKS + k * (index + (4 + 4 + 8 + 4) / RANKS)


def held() -> int:
    """Bytes of the distinct storages of all tensors of this process."""
    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if thing.grad is not None:
                storages[thing.grad.untyped_storage().data_ptr()] = thing.grad.untyped_storage().nbytes()
    return sum(storages.values())


def rank_main(rank: int, port: int, stage: int, layers: int, out: Path) -> None:
    """One rank: every share of neurons in turn, on a model of its own."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_RANK": str(rank),
        "DS_ACCELERATOR": "cpu",
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from allo_ray.config.train import TrainConfig, TrainerConfig
    from allo_ray.neurons.parametrize import attach
    from allo_ray.neurons.selection import Selection
    from allo_ray.train.attention import ATTENTION, register
    from allo_ray.train.batching import pack
    from allo_ray.train.forward import Policy
    from allo_ray.train.rows import Row
    from allo_ray.train.zero import ZeroUpdater
    from benchmarks.train_step import random_selection

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    register()
    none = np.zeros(0, dtype=np.float32)
    ids = np.arange(3, 13, dtype=np.int32)
    batch = pack([Row(0, "row", ids, ids, ids[::-1].copy(), none, none, none)], "pair")
    found = {}
    for k in SHARES:
        before = held()
        torch.manual_seed(0)
        shape = dict(hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_key_value_heads=4)
        described = LlamaConfig(vocab_size=8192, num_hidden_layers=layers, **shape)
        model = LlamaForCausalLM._from_config(described, dtype=torch.bfloat16, attn_implementation=ATTENTION)
        dense = Selection.of_model(model)
        neurons = attach(model, dense if k == 1 else random_selection(dense, k))
        total = dense.total
        trainer = TrainerConfig.model_validate({"zero_stage": stage})
        updater = ZeroUpdater(Policy(model), neurons, TrainConfig(lr=1e-5, dtype="bfloat16"), trainer)
        updater.backward(updater.forward(batch).sum(), last=True)
        updater.update(1.0, 1e-5)
        updater.backward(updater.forward(batch).sum(), last=True)
        found[str(k)] = {
            "held": (held() - before) / total,
            "arithmetic": arithmetic(k, stage),
            "neurons": total,
        }
        updater.update(1.0, 1e-5)
        updater.engine.destroy()
        del model, neurons, updater
    if rank == 0:
        out.write_text(json.dumps(found))


def measure(stage: int, layers: int) -> dict[str, Any]:
    """Starts the ranks of one ZeRO stage and returns what rank 0 found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--json", str(out)]
        command += ["--layers", str(layers), "--stage", str(stage), "--port", str(port), "--rank"]
        ranks = [
            subprocess.Popen(
                [*command, str(rank)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            for rank in range(RANKS)
        ]
        for process in ranks:
            _, complaint = process.communicate()
            if process.returncode:
                raise RuntimeError(complaint[-3000:])
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--layers", type=int, default=8)
    for name in ("stage", "port", "rank"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank is not None:
        rank_main(asked.rank, asked.port, asked.stage, asked.layers, asked.json)
        return
    found = {}
    for stage in range(4):
        found[f"zero{stage}"] = measure(stage, asked.layers)
        for k, told in found[f"zero{stage}"].items():
            print(
                f"ZeRO {stage}  k = {100 * float(k):5.1f} %  {told['held']:6.2f} B a neuron held, "
                f"{told['arithmetic']:6.2f} by arithmetic",
                flush=True,
            )
    asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
