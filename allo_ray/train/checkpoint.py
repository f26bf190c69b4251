"""Checkpoints of size K: values, moments, position, and the metrics so far.

A checkpoint is a folder with `state.safetensors` and `position.json`. It stands at its place only when it is `whole`.
The state is the same for every number of workers and every sharding (updater.Updater.state).
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

#: Checkpoints of a run that are kept.
LAST = 2


@dataclass
class Progress:
    """Where a run stands: `step` global batches are done; one metrics row for each of them."""

    step: int = 0
    #: Global batches without a weighted token, which were skipped.
    skipped: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)

    def snapshot(self) -> Progress:
        """A copy that the loop's next steps leave alone."""
        return Progress(self.step, self.skipped, list(self.metrics))


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """Another folder to write into, which becomes `folder`, in place of what is there, when all is written."""
    # Workers of a run that was given up may still be at the same: what they write is not mixed up with this.
    part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.part")
    part.mkdir(parents=True)
    yield part
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(part, folder)


def save(folder: Path, state: dict[str, torch.Tensor], progress: Progress) -> None:
    """Writes a checkpoint to `folder`."""
    with whole(folder) as part:
        save_file(state, part / "state.safetensors")
        described = {"step": progress.step, "skipped": progress.skipped, "metrics": progress.metrics}
        (part / "position.json").write_text(json.dumps(described))


class Writer:
    """Stores checkpoints beside the steps, one at a time; one that still waits gives way to the next."""

    def __init__(self, run_folder: Path) -> None:
        self._folder = run_folder
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._lock = threading.Lock()
        self._waiting: tuple[dict[str, torch.Tensor], Progress] | None = None
        self._error: Exception | None = None

    def put(self, state: dict[str, torch.Tensor], progress: Progress) -> None:
        """Has a checkpoint stored, which nobody may change from now on. Raises what storing an earlier one raised."""
        self._check()
        with self._lock:
            due, self._waiting = self._waiting is None, (state, progress)
        if due:
            self._pool.submit(self._store)

    def close(self) -> None:
        """Waits for what is being stored; what waits is left out. Raises what storing raised."""
        self._pool.shutdown(cancel_futures=True)
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _store(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, None
        assert waiting is not None, "submitted once for each that was put there"
        state, progress = waiting
        try:
            save(self._folder / f"step-{progress.step:08d}", state, progress)
            for old in _stored(self._folder)[:-LAST]:
                shutil.rmtree(old)
        except Exception as error:
            self._error = error


def latest(run_folder: Path) -> Path | None:
    """The checkpoint of the highest step, among the folders `step-<number>`; None if there is none."""
    return next(reversed(_stored(run_folder)), None)


def _stored(run_folder: Path) -> list[Path]:
    return sorted(run_folder.glob("step-" + "[0-9]" * 8))


def load(folder: Path) -> tuple[dict[str, torch.Tensor], Progress]:
    """Reads what `save` wrote."""
    return load_file(folder / "state.safetensors"), Progress(
        **json.loads((folder / "position.json").read_text())
    )
