"""Speed and memory of exact location on random shards, beside torch.topk where that fits.

    python -m benchmarks.locate --gigabytes 1 4 16 --json locate.json

Each size and way is one process of its own: θ0 and θ' as float32 safetensors shards of equal size on disk, measured
and ranked once, then selected for k = 5, 10 and 20 % in one pass. Gigabytes (10^9) are those of both models together;
the ranked importances take as much again on disk. The ways are those of the stages: in one process, and by Ray tasks
on `--cpus` CPUs. `cpu_seconds_per_gigabyte` of the sizes side by side says whether the cost is linear; the seconds by
the clock are so only while the page cache holds all of it, and `from_disk` tells the gigabytes that it did not hold,
`disk` how fast the disk is at a file of 2 GB, unbuffered. Memory is the peak
of a process's anonymous memory, without the mapped files that the page cache holds: for one process over what it held
before, for tasks that of the largest of them with its imports.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from allo_ray.data.ordered_tasks import in_order
from allo_ray.models import ModelRef
from allo_ray.neurons.importance import Counted
from allo_ray.neurons.ranked_files import RankedFiles
from allo_ray.neurons.select import select
from allo_ray.session import quiet, start_local
from allo_ray.stages import locate
from allo_ray.stages.importance import Pair

KS = [0.05, 0.1, 0.2]
#: Neurons of one tensor: an MLP weight of a 7B model is 45 million.
TENSOR = 1 << 24


def write_shards(folder: Path, gigabytes: float) -> int:
    """Random models, one tensor a shard; returns the number of tensors."""
    random = torch.Generator().manual_seed(0)
    count = max(1, round(gigabytes * 1e9 / (8 * TENSOR)))
    for name in ("before", "after"):
        (folder / name).mkdir()
    for number in range(count):
        before = torch.empty(TENSOR).normal_(std=0.02, generator=random)
        update = torch.empty(TENSOR).normal_(std=1e-5, generator=random)
        name = f"w{number:05}"
        save_file({name: before}, folder / "before" / f"{name}.safetensors")
        save_file({name: before + update}, folder / "after" / f"{name}.safetensors")
    os.sync()  # what is still to be written would be written while others read
    return count


def tensors(folder: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for path in sorted((folder / "before").iterdir()):
        other = folder / "after" / path.name
        with safe_open(str(path), framework="pt") as before, safe_open(str(other), framework="pt") as after:
            yield before.get_tensor(path.stem), after.get_tensor(path.stem)


def anonymous(process: int | str = "self") -> int:
    """Bytes of a process's memory that no file backs; 0 where it is gone."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def watched(by_tasks: bool) -> int:
    """Anonymous memory of this process, or of its largest Ray task."""
    if not by_tasks:
        return anonymous()
    found = 0
    for child in psutil.Process().children(recursive=True):
        try:
            if child.name().startswith("ray::"):
                found = max(found, anonymous(child.pid))
        except psutil.NoSuchProcess:
            continue
    return found


def spent(by_tasks: bool) -> tuple[float, float]:
    """CPU seconds of this process, or of its Ray processes, and gigabytes that came from the disk."""
    processes = psutil.Process().children(recursive=True) if by_tasks else [psutil.Process()]
    cpu = read = 0.0
    for process in processes:
        try:
            if not by_tasks or process.name().startswith("ray::"):
                told = process.cpu_times()
                cpu += told.user + told.system
                read += process.io_counters().read_bytes / 1e9  # type: ignore[attr-defined]
        except psutil.NoSuchProcess:
            continue
    return cpu, read


def disk(folder: Path) -> dict[str, float]:
    """Gigabytes a second that a file of 2 GB is written and read with, past the page cache."""
    file, block, blocks = folder / "disk", os.urandom(1 << 24), 120
    size = blocks * len(block) / 1e9
    began = time.perf_counter()
    handle = os.open(file, os.O_RDWR | os.O_CREAT)
    for _ in range(blocks):
        os.write(handle, block)
    os.fsync(handle)
    wrote = time.perf_counter()
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(handle, 0, os.SEEK_SET)
    began_reading = time.perf_counter()
    while os.read(handle, 1 << 24):
        pass
    read = time.perf_counter()
    os.close(handle)
    file.unlink()
    return {
        "write_gigabytes_per_second": size / (wrote - began),
        "read_gigabytes_per_second": size / (read - began_reading),
    }


def measure(folder: Path, count: int, cpus: int, results: Any) -> None:
    """Runs in a process of its own and puts the figures into `results`; cpus: 0 for this process alone."""
    torch.set_num_threads(1)
    here = cpus == 0
    if not here:
        quiet()
        start_local(num_cpus=cpus)
        list(in_order(abs, range(2 * cpus)))  # processes start once for a whole run, too
    parameters = {f"w{number:05}": [(f"w{number:05}", (TENSOR,))] for number in range(count)}
    pair = Pair(ModelRef(str(folder / "before")), ModelRef(str(folder / "after")), parameters)
    shards = {f"{name}.safetensors": [name] for name in parameters}
    out = folder / "out"
    out.mkdir()
    locate.HERE = 1 << 62 if here else 0
    start, peak, done = anonymous() if here else 0, [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01 if here else 0.1):
            peak[0] = max(peak[0], watched(not here))

    watcher = threading.Thread(target=watch)
    watcher.start()
    (cpu, read), began = spent(not here), time.perf_counter()
    counted: list[Counted] = []
    for found in in_order(partial(pair.write, out), shards.items(), here):
        counted += found
    (cpu_measured, read_measured), measured = spent(not here), time.perf_counter()
    peak_measured, peak[0] = peak[0], 0
    files = RankedFiles(counted, {name: shard for shard, [name] in shards.items()}, "")
    selections = select(counted, partial(locate.mapped, str(out), files), KS)
    (cpu_ended, read_ended), ended = spent(not here), time.perf_counter()
    done.set()
    watcher.join()
    ray.shutdown()
    assert [found.count for found in selections] == [round(k * count * TENSOR) for k in KS]
    size = count * TENSOR * 8 / 1e9
    results.put(
        {
            "gigabytes": size,
            "neurons": count * TENSOR,
            "cpus": cpus or 1,
            "measure_seconds": measured - began,
            "select_seconds": ended - measured,
            "measure_cpu_seconds": cpu_measured - cpu,
            "select_cpu_seconds": cpu_ended - cpu_measured,
            "measure_from_disk": read_measured - read,
            "select_from_disk": read_ended - read_measured,
            "cpu_seconds_per_gigabyte": (cpu_ended - cpu) / size,
            "gigabytes_per_second": size / (ended - began),
            "measure_peak_bytes": peak_measured - start,
            "select_peak_bytes": peak[0] - start,
            "selections_bytes": 4 * sum(found.count for found in selections),
            "two_tensors_bytes": 2 * TENSOR * 4,
        }
    )


def measure_topk(folder: Path, results: Any) -> None:
    """torch.topk over the concatenation, for k = 10 %; needs all differences in memory at once."""
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    differences = torch.cat([(after - before).abs() for before, after in tensors(folder)])
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
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 4, 16])
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="of the Ray tasks")
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
            count = write_shards(folder, gigabytes)
            found: dict[str, Any] = {"disk": disk(folder)}
            for way, cpus in (("one_process", 0), ("tasks", told.cpus)):
                found[way] = alone(measure, folder, count, cpus)
                shutil.rmtree(folder / "out")
            if gigabytes <= told.topk_up_to:
                found["topk"] = alone(measure_topk, folder)
        finally:
            shutil.rmtree(folder)
        print(json.dumps(found), flush=True)
        figures.append(found)
    for way in ("one_process", "tasks"):
        told_each = ", ".join(
            f"{found[way]['cpu_seconds_per_gigabyte']:.2f} at {found[way]['gigabytes']:.1f} GB"
            for found in figures
        )
        print(f"{way.replace('_', ' ')}, CPU seconds a gigabyte: {told_each}")
    if told.json:
        Path(told.json).write_text(json.dumps({"k": KS, "runs": figures}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
