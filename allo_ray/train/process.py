"""Settings of a worker process that make training fast and repeatable, before torch does any work."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

#: glibc mallopt parameters (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def prepare_process(threads: int | None, gpu: bool) -> None:
    """Pins threads, picks DeepSpeed's accelerator, and keeps freed memory in the process.

    Without the last, glibc gives every large activation back to the kernel and faults it in again: raising its
    thresholds took about 20 % off forward and backward on the CPU.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        libc = _libc()
        if libc is not None and hasattr(libc, "mallopt"):
            # Older glibc refuses an mmap threshold above 32 MiB.
            if not libc.mallopt(_MMAP_THRESHOLD, 1 << 30):
                libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
            libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
            libc.mallopt(_TOP_PAD, 64 << 20)
    if threads is not None:
        torch.set_num_threads(threads)


def clear(gpu: bool) -> None:
    """Gives back what an earlier job of this process has left, so that peaks count from here."""
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    libc = _libc()
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    with suppress(OSError):  # a sandbox that does not offer it
        Path("/proc/self/clear_refs").write_text("5")


def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libc.so.6")
    except OSError:  # another C library, with an allocator of its own
        return None


def peak_rss() -> int:
    """Bytes of memory that this process has held at most since `clear`.

    `ru_maxrss` is the second choice (some sandboxes tell no more): a child starts with that of whoever forked it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def masters_of(
    base: str, layers: tuple[str, ...], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]] | None:
    """The fp32 values that a model in `dtype` starts from; None where it holds them exactly when loaded.

    Without layers that is so unless the folder stores float32: its cast would lose what training starts from.
    """
    if not layers and (dtype == torch.float32 or not _stores_float32(Path(base))):
        return None
    from allo_ray.neurons.masters import iter_masters

    return iter_masters(base, layers)


def _stores_float32(folder: Path) -> bool:
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        if any(entry.get("dtype") == "F32" for name, entry in header.items() if name != "__metadata__"):
            return True
    return False
