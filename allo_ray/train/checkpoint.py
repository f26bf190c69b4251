"""Checkpoints of size K: values, moments, position, and the metrics so far.

A checkpoint is a folder with `state.safetensors` and `position.json`. It stands at its place only when it is `whole`.
The state is the same for every number of workers and every sharding (updater.Updater.state).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


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
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
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


def latest(run_folder: Path) -> Path | None:
    """The checkpoint of the highest step, among the folders `step-<number>`; None if there is none."""
    return max(run_folder.glob("step-" + "[0-9]" * 8), default=None)


def load(folder: Path) -> tuple[dict[str, torch.Tensor], Progress]:
    """Reads what `save` wrote."""
    return load_file(folder / "state.safetensors"), Progress(
        **json.loads((folder / "position.json").read_text())
    )
