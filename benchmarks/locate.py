"""Speed and memory of exact location on random shards, beside torch.topk where that fits.

    python -m benchmarks.locate --gigabytes 1 4 16 --json locate.json

Each size is one process of its own: θ0 and θ' as float32 safetensors shards of equal size on disk, selected for
k = 5, 10 and 20 % from one set of passes. Gigabytes (10^9) are those of both models together, read once a pass.
Memory is the peak of the process's anonymous memory, without the mapped files that the page cache holds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from allo_ray.neurons.select import select

KS = [0.05, 0.1, 0.2]
#: Neurons of one tensor: an MLP weight of a 7B model is 45 million.
TENSOR = 1 << 24


def write_shards(folder: Path, gigabytes: float) -> int:
    """Random models, one tensor a shard; returns the number of tensors."""
    random = torch.Generator().manual_seed(0)
    count = max(1, round(gigabytes * 1e9 / (8 * TENSOR)))
    for number in range(count):
        before = torch.empty(TENSOR).normal_(std=0.02, generator=random)
        update = torch.empty(TENSOR).normal_(std=1e-5, generator=random)
        save_file({"w": before}, folder / f"before-{number:05}.safetensors")
        save_file({"w": before + update}, folder / f"after-{number:05}.safetensors")
    return count


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    for path in sorted(folder.glob("before-*.safetensors")):
        other = path.with_name(path.name.replace("before", "after"))
        with safe_open(str(path), framework="pt") as before, safe_open(str(other), framework="pt") as after:
            yield path.stem, before.get_tensor("w"), after.get_tensor("w")


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def measure(folder: Path, count: int, results: Any) -> None:
    """Runs in a process of its own and puts the figures into `results`."""
    torch.set_num_threads(1)
    start, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    selections = select(lambda: tensors(folder), KS)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    done.set()
    watcher.join()
    assert [found.count for found in selections] == [round(k * count * TENSOR) for k in KS]
    size = count * TENSOR * 8
    held = sum(found.count for found in selections) * 4
    results.put(
        {
            "gigabytes": size / 1e9,
            "neurons": count * TENSOR,
            "wall_seconds": wall,
            "cpu_seconds": cpu,
            "gigabytes_per_second": size / 1e9 / wall,
            "gigabytes_per_cpu_second": size / 1e9 / cpu,
            "peak_bytes": peak[0] - start,
            "peak_bytes_besides_the_selections": peak[0] - start - held,
            "two_tensors_bytes": 2 * TENSOR * 4,
        }
    )


def measure_topk(folder: Path, results: Any) -> None:
    """torch.topk over the concatenation, for k = 10 %; needs all differences in memory at once."""
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    differences = torch.cat([(after - before).abs() for _, before, after in tensors(folder)])
    torch.topk(differences, round(0.1 * len(differences)))
    results.put({"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu})


def alone(function: Any, *args: Any) -> dict[str, Any]:
    """The result of a function run in a fresh process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=function, args=(*args, results))
    process.start()
    found = results.get()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 4])
    parser.add_argument(
        "--topk-up-to", type=float, default=2, help="largest size that torch.topk is tried on"
    )
    parser.add_argument("--folder", help="where to put the shards; the temporary folder by default")
    parser.add_argument("--json", help="file for the figures")
    told = parser.parse_args()
    figures = []
    for gigabytes in told.gigabytes:
        folder = Path(tempfile.mkdtemp(prefix="locate-", dir=told.folder))
        try:
            found = alone(measure, folder, write_shards(folder, gigabytes))
            if gigabytes <= told.topk_up_to:
                found["topk"] = alone(measure_topk, folder)
        finally:
            shutil.rmtree(folder)
        print(json.dumps(found), flush=True)
        figures.append(found)
    if told.json:
        Path(told.json).write_text(json.dumps({"k": KS, "runs": figures}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
