"""What measuring, selecting and exporting hold in memory, in a process of its own: python -m tests.neurons.peak FOLDER

Prints JSON: bytes of the largest tensor and of all of them in float32; peak of this process's anonymous memory (what
no file backs) over what it held before, by step; whether the selection is that of torch.topk.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from allo_ray.neurons import delta
from allo_ray.neurons.export import export
from allo_ray.neurons.masters import Masters
from allo_ray.neurons.ranked_files import map_shard, write_shard
from allo_ray.neurons.select import select
from allo_ray.neurons.selection import Selection

K = 0.05
#: Three MLP weights of 32 MiB each, and little else.
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=1024,
    intermediate_size=8192,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)


def anonymous() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line]
    return int(line.split()[1]) * 1024


def peak(function: Callable[[], object]) -> tuple[int, object]:
    """Bytes at most while a function runs, over those before; and what it returns."""
    start, most, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.0005):
            most[0] = max(most[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = function()
    done.set()
    watcher.join()
    return most[0] - start, found


def main(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    base, tuned = folder / "base", folder / "tuned.safetensors"
    model = LlamaForCausalLM(CONFIG)
    model.save_pretrained(base)
    selection = Selection.of_model(model)
    moved = {name: weight + 1e-5 * torch.randn_like(weight) for name, weight in model.named_parameters()}
    delta.from_values(moved, selection).save(tuned)
    del model, moved
    before, after = Masters(base), Masters(base, [tuned])
    shard = folder / "shard.safetensors"
    measuring, counted = peak(lambda: write_shard(shard, before, after, before.names))

    def mapper(function, names):
        return map_shard(function, str(shard), names)

    selecting, found = peak(lambda: select(counted, mapper, [K])[0])
    exporting, _ = peak(partial(export, base, [tuned], folder / "out"))
    sizes = [weight.numel() * 4 for _, weight in before]
    importances = torch.cat([(after.read(name) - weight).abs().view(-1) for name, weight in before])
    at, chosen = 0, []
    for name, size in zip(before.names, sizes, strict=True):
        chosen.append(found.indices[name].long() + at)
        at += size // 4
    best = torch.topk(importances, round(K * len(importances))).values
    same = torch.equal(importances[torch.cat(chosen)].sort().values, best.sort().values)
    told = {"tensor": max(sizes), "model": sum(sizes), "exact": same}
    print(json.dumps(told | {"measure": measuring, "select": selecting, "export": exporting}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
