"""What a training job is given and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from allo_ray.config.train import TrainConfig, TrainerConfig
from allo_ray.spent import Spent

#: Files of a finished job, in its `out` folder.
DELTA, METRICS, FACTS = "delta.safetensors", "metrics.parquet", "train.json"
#: q of Eq. 8 for some rows of the last batch, where the loss drops noisy tokens.
KEPT = "kept.parquet"
#: Folder of LOGPROBS of the trained model, where the job asks for them.
LOGPROBS = "logprobs"
#: What rank 0 says of a running job, for the progress line; in the `out` folder.
HEARTBEAT = "progress.json"
#: Its steps so far, a JSON row of METRICS a line; another file after each restart of the workers.
STEPS = "steps.jsonl"
#: Folder of the running job's checkpoints, and then of its results, under `out`; gone when the job is done.
RUN = "run"
#: What is trained in `out`, so that checkpoints of another job are not taken for this one's.
CLAIM = "job.json"


class ProgressLine(Protocol):
    """A live line for the user."""

    def update(self, done: int, total: int, unit: str, **facts: Any) -> None:
        """`done` of `total` units are finished."""
        ...


@dataclass(frozen=True)
class TrainJob:
    """One trained stage.

    Attributes:
        base: folder of the model whose weights everything starts from.
        layers: delta files (fp32 masters) over it, applied in order.
        selection: file of the neurons to train; None trains all of them.
        rows: TRAIN_ROWS table, a Parquet file or a folder of them, in the order of training.
        loss: name in `losses.registry.LOSSES`, with its hyper-parameters in `loss_args`.
        out: folder for the results, reachable from every worker.
        own_reference: the reference log-probs of the rows are those of the model that training starts from.
        pairs: PAIRS whose log-probs the trained model gives before it leaves the memory, for a stage that starts from
            it.
    """

    base: str
    layers: tuple[str, ...]
    selection: str | None
    rows: str
    loss: str
    config: TrainConfig
    trainer: TrainerConfig
    out: str
    loss_args: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    own_reference: bool = True
    pairs: str | None = None

    @property
    def run(self) -> Path:
        """Folder of its checkpoints."""
        return Path(self.out) / RUN

    @property
    def result(self) -> Path:
        """Folder of DELTA and FACTS, as the workers leave them."""
        return self.run / "result"


@dataclass(frozen=True)
class TrainResult:
    """Where the results lie.

    Attributes:
        facts: what train.json holds.
        spent: seconds until the first batch began, and seconds that passed for other jobs' sake.
    """

    delta: Path
    metrics: Path
    facts: dict[str, Any]
    spent: Spent
