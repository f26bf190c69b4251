"""Reference log-probs: per response token, in float32, by the forward pass and in the dtype that training uses.

So the log-ratios of the first training step are 0, which those of another engine would not be. The model that a stage
starts from is asked once; no reference model is in memory while training.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import torch

from allo_ray import tables
from allo_ray.config.base import bounds
from allo_ray.config.train import TrainerConfig
from allo_ray.errors import UserError
from allo_ray.reach import expect
from allo_ray.train.batching import Packed, pack
from allo_ray.train.forward import Policy, load_model
from allo_ray.train.job import ProgressLine
from allo_ray.train.process import masters_of, prepare_process
from allo_ray.train.rows import Row, micro_batches

Forward = Callable[[Packed], torch.Tensor]
COLUMNS = ("id", "prompt_ids", "chosen_ids", "rejected_ids")
#: Pairs of a shard: also the step at which an interrupted job goes on.
SHARD_ROWS = 512


@dataclass(frozen=True)
class LogprobsResult:
    """`facts`: pairs, tokens, seconds. `startup_seconds`: from the call until the first pair was computed."""

    facts: dict[str, Any]
    startup_seconds: float


def compute_logprobs(
    base: str,
    layers: tuple[str, ...],
    pairs: str | Path,
    out: str | Path,
    dtype: str,
    trainer: TrainerConfig,
    progress: ProgressLine | None = None,
) -> LogprobsResult:
    """Writes the table LOGPROBS of all `pairs` (PAIRS) under the model `base` with `layers`, as shards in `out`.

    Shards that are there are kept: a job run again does what is missing.

    Raises:
        UserError: no pairs there; a log-prob is not finite (names the pairs).
    """
    import ray.data

    called = time.time()
    out = Path(out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    files = tables.PAIRS.files(pairs)
    if not files:
        raise UserError(f"{pairs}: no pairs there.")
    total = sum(pq.read_metadata(file).num_rows for file in files)
    fewest, most = bounds(trainer.workers)
    # Reading takes no CPU, so that actors may hold all there are.
    rows = ray.data.read_parquet(str(pairs), columns=list(COLUMNS), num_cpus=0)
    shards = rows.map_batches(
        LogprobActor,
        fn_constructor_kwargs={
            "base": base,
            "layers": layers,
            "out": str(out),
            "dtype": dtype,
            "trainer": trainer.model_dump(),
        },
        batch_size=min(SHARD_ROWS, max(1, -(-total // most))),
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=fewest, max_size=most),
        num_cpus=trainer.num_cpus,
        num_gpus=trainer.num_gpus or None,
        resources=trainer.resources or None,
    )
    shards.context.execution_options.preserve_order = True
    shards.context.enable_progress_bars = False
    done = tokens = 0
    first = float("inf")
    for told in shards.iter_rows():
        if told["error"]:
            raise UserError(told["error"])
        done, tokens, first = done + told["pairs"], tokens + told["tokens"], min(first, told["began_at"])
        if progress is not None:
            progress.update(done, total, "pair")
    seconds = time.time() - called
    return LogprobsResult({"pairs": done, "tokens": tokens, "seconds": seconds}, first - called)


class LogprobActor:
    """Holds the model; turns a batch of pairs into a shard and returns one row about it."""

    def __init__(
        self, base: str, layers: tuple[str, ...], out: str, dtype: str, trainer: dict[str, Any]
    ) -> None:
        expect(out)
        self.trainer = TrainerConfig(**trainer)
        gpu = self.trainer.num_gpus > 0
        prepare_process(self.trainer.threads, gpu)
        self.device = torch.device("cuda" if gpu else "cpu")
        model = load_model(base, getattr(torch, dtype))
        weights = dict(model.named_parameters())
        masters = masters_of(base, layers, getattr(torch, dtype))
        with torch.no_grad():
            for name, master in masters or ():
                if name in weights:
                    weights[name].copy_(master)
        self.policy = Policy(model.to(self.device))
        self.out = Path(out)

    def __call__(self, batch: pa.Table) -> pa.Table:
        began = time.time()
        file = _shard(self.out, batch)
        tokens, error = 0, ""
        if not file.exists():
            rows = pair_rows(batch)
            found, tokens = logprobs_of(self.policy, rows, self.trainer.micro_batch_tokens, self.device)
            try:
                _check_finite(rows, found)
                _write(file, rows, found)
            except UserError as problem:  # told as a result: Ray would try again what cannot succeed
                error = str(problem)
        return pa.table({"pairs": [len(batch)], "tokens": [tokens], "began_at": [began], "error": [error]})


def record_logprobs(
    forward: Forward,
    pairs: str | Path,
    out: Path,
    budget: int,
    device: torch.device,
    turn: tuple[int, int],
    whole: bool,
) -> None:
    """Writes LOGPROBS of all `pairs` under a model that is in memory already: that which has just been trained.

    Args:
        turn: (worker, workers); each worker writes every so many-th shard.
        whole: a forward pass takes all workers (sharded weights), so each computes every shard.

    Raises:
        UserError: a log-prob is not finite.
    """
    worker, workers = turn
    source = pads.dataset(tables.PAIRS.files(pairs))
    size = min(SHARD_ROWS, max(1, -(-source.count_rows() // workers)))
    out.mkdir(parents=True, exist_ok=True)
    for number, batch in enumerate(source.to_batches(columns=list(COLUMNS), batch_size=size)):
        mine = number % workers == worker
        if mine or whole:
            rows = pair_rows(batch)
            found, _ = logprobs_of(forward, rows, budget, device)
            _check_finite(rows, found)  # here as well where it is not ours: all workers end at the same shard
            if mine:
                _write(_shard(out, batch), rows, found)


def _shard(out: Path, batch: pa.Table | pa.RecordBatch) -> Path:
    return out / f"{tables.content_id(*batch.column('id').to_pylist())}.parquet"


def _check_finite(rows: list[Row], found: list[tuple[np.ndarray, np.ndarray]]) -> None:
    broken = [
        row.id
        for row, parts in zip(rows, found, strict=True)
        if not all(np.isfinite(part).all() for part in parts)
    ]
    if broken:
        raise UserError(
            f"reference log-probs are not finite for the pairs {', '.join(broken[:16])}. Look at these pairs "
            "and at the model, or compute in float32."
        )


def _write(file: Path, rows: list[Row], found: list[tuple[np.ndarray, np.ndarray]]) -> None:
    part = file.with_suffix(f".{os.getpid()}.part")
    table = [
        {"id": row.id, "chosen": chosen, "rejected": rejected}
        for row, (chosen, rejected) in zip(rows, found, strict=True)
    ]
    tables.LOGPROBS.write(table, part)
    os.replace(part, file)


def pair_rows(pairs: pa.Table | pa.RecordBatch) -> list[Row]:
    """Rows without references or weights of a table with the columns `COLUMNS`."""
    none = np.zeros(0, dtype=np.float32)
    columns = [pairs.column(name).to_pylist() for name in COLUMNS]
    rows = []
    for at, (name, *sequences) in enumerate(zip(*columns, strict=True)):
        prompt, chosen, rejected = (np.asarray(ids, dtype=np.int32) for ids in sequences)
        rows.append(Row(at, name, prompt, chosen, rejected, none, none, none))
    return rows


@torch.no_grad()
def logprobs_of(
    forward: Forward, rows: list[Row], budget: int, device: torch.device
) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
    """Log-probs (chosen, rejected) of each row, float32, nats, and the number of tokens read."""
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    tokens = 0
    for part in micro_batches(rows, "pair", workers=1, worker=0, budget=budget):
        packed = pack(part, "pair")
        tokens += len(packed.tokens)
        answers = forward(packed.to(device)).cpu().numpy()
        start = 0
        for row in part:
            middle, end = start + len(row.chosen), start + len(row.chosen) + len(row.rejected)
            found[row.position] = (answers[start:middle], answers[middle:end])
            start = end
    return [found[row.position] for row in rows], tokens
