"""One training worker: builds the policy, finds its place in the run, trains, leaves the result; in Ray Train."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import torch

from allo_ray import tables
from allo_ray.errors import UserError
from allo_ray.metrics import TrainMetrics
from allo_ray.models import fingerprint
from allo_ray.neurons import delta
from allo_ray.neurons.parametrize import Neurons, attach
from allo_ray.neurons.selection import Selection
from allo_ray.train import checkpoint
from allo_ray.train.forward import Policy, load_model
from allo_ray.train.job import DELTA, FACTS, HEARTBEAT, KEPT, LOGPROBS, STEPS, TrainJob
from allo_ray.train.kept import kept_tokens
from allo_ray.train.logprobs import record_logprobs
from allo_ray.train.loop import Plan, run
from allo_ray.train.process import clear, masters_of, prepare_process
from allo_ray.train.rows import Row, global_batches
from allo_ray.train.updater import Updater

T = TypeVar("T")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def build(job: TrainJob, device: torch.device) -> tuple[Policy, Neurons]:
    """Loads the model, lays the fp32 masters over it, and attaches the selected neurons.

    Raises:
        UserError: the selection or a layer does not belong to the model.
    """
    dtype = DTYPES[job.config.dtype]
    model = load_model(job.base, dtype, job.trainer.checkpointing).to(device)
    selection = Selection.of_model(model) if job.selection is None else Selection.load(job.selection)
    neurons = attach(model, selection, masters_of(job.base, job.layers, dtype))
    return Policy(model), neurons


def run_worker(job: TrainJob, steps: int, rows: Iterable[pa.Table]) -> None:
    """Trains to the end and leaves the result, unless an earlier group of workers has left it.

    An error of the user's is a result too, since Ray would try again what cannot succeed.
    """
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    gpu, out = job.trainer.num_gpus > 0, Path(job.out)
    prepare_process(job.trainer.threads, gpu)
    clear(gpu)
    torch.manual_seed(job.seed)
    device = get_device() if gpu else torch.device("cpu")
    plan = Plan(
        loss=job.loss,
        loss_args=job.loss_args,
        config=job.config,
        steps=steps,
        micro_batch_tokens=job.trainer.micro_batch_tokens,
        worker=context.get_world_rank(),
        workers=context.get_world_size(),
        checkpoint_every=job.trainer.checkpoint_every,
        own_reference=job.own_reference,
        device=device,
    )
    if _of_first((job.result / FACTS).exists()):
        return
    reporter = _Reporter(job, plan)
    reporter.mark("worker_started")
    try:
        policy, neurons = _on_all(lambda: build(job, device))
        reporter.mark("model_loaded")
        updater = _make_updater(policy, neurons, job)
        progress = _resume(updater, job.run)
        resumed_at = progress.step
        reporter.updater = updater
        reporter.mark("engine_built")
        batches = reporter.clocked(global_batches(rows, job.config.batch_size, progress.step))
        progress = run(updater, plan, batches, progress, _add_up(device), reporter.on_step, reporter.save)
        if job.pairs is not None:
            turn, budget = (plan.worker, plan.workers), plan.micro_batch_tokens
            sharded = job.trainer.zero_stage == 3 and plan.workers > 1
            pairs = job.pairs
            _on_all(
                lambda: record_logprobs(updater.forward, pairs, out / LOGPROBS, budget, device, turn, sharded)
            )
    except UserError as error:
        reporter.finish({"error": str(error)})
        return
    if "v" in job.loss_args and reporter.last_rows:
        kept = kept_tokens(updater, reporter.last_rows, job.loss_args["v"], device)
        if plan.worker == 0:
            tables.KEPT.write(kept, out / KEPT)
    state = updater.state()
    facts = {
        "steps": progress.step,
        "resumed_at": resumed_at,
        "skipped_batches": progress.skipped,
        "neurons": neurons.count,
        "neurons_total": neurons.selection.total,
        "workers": plan.workers,
        "metrics": progress.metrics,
    }
    reporter.finish(facts, state, neurons)


def _make_updater(policy: Policy, neurons: Neurons, job: TrainJob) -> Updater:
    from allo_ray.train.zero import ZeroUpdater

    return ZeroUpdater(policy, neurons, job.config, job.trainer)


def _resume(updater: Updater, run_folder: Path) -> checkpoint.Progress:
    """Loads the newest whole checkpoint of this run."""
    found = _of_first(checkpoint.latest(run_folder))
    if found is None:
        return checkpoint.Progress()
    state, progress = checkpoint.load(found)
    updater.load(state)
    return progress


def _on_all(work: Callable[[], T]) -> T:
    """Does it on every worker; what one raises for the user all of them raise, so that none waits for another."""
    found: T | None = None
    errors: list[str | None] = [None] * torch.distributed.get_world_size()
    mine = None
    try:
        found = work()
    except UserError as error:
        mine = str(error)
    torch.distributed.all_gather_object(errors, mine)
    for error in errors:
        if error is not None:
            raise UserError(error)
    return found  # type: ignore[return-value]


def _of_first(seen: T) -> T:
    """What rank 0 sees, on every worker: a file may reach nodes one after the other."""
    told = [seen]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def _add_up(device: torch.device):
    """Sums a float64 tensor over the workers."""

    def add_up(sums: torch.Tensor) -> None:
        if torch.distributed.get_world_size() > 1:
            moved = sums.to(device)
            torch.distributed.all_reduce(moved)
            sums.copy_(moved)

    return add_up


class _Reporter:
    """Checkpoints, heartbeat and result of this worker."""

    def __init__(self, job: TrainJob, plan: Plan) -> None:
        self.job, self.out, self.plan = job, Path(job.out), plan
        self.updater: Updater | None = None
        #: When each part of the start-up was done, and the job, seconds since the epoch.
        self.timeline: dict[str, float] = {}
        self.last_rows: list[Row] = []
        self._checkpoints = checkpoint.Writer(job.run)
        self._metrics = TrainMetrics(self.out.name) if plan.worker == 0 else None
        self._told_at = 0.0
        self._steps_written = 0

    def clocked(self, batches: Iterator[list[Row]]) -> Iterator[list[Row]]:
        """The same batches; notes when the first one arrives."""
        for batch in batches:
            if "first_batch" not in self.timeline:
                self.mark("first_batch")
            self.last_rows = batch
            yield batch

    def mark(self, event: str) -> None:
        """Notes that this is done."""
        self.timeline[event] = time.time()

    def on_step(self, progress: checkpoint.Progress) -> None:
        """Tells the driver how far the run is, at most twice a second."""
        if self._metrics is not None:
            self._metrics.step(progress.metrics[-1])
        if self.plan.worker != 0 or time.monotonic() - self._told_at < 0.5:
            return
        self._told_at = time.monotonic()
        last = progress.metrics[-1]
        told = {
            "done": progress.step,
            "pid": os.getpid(),
            "loss": last["loss"],
            "tokens_per_second": last["tokens_per_second"],
        }
        waiting = self.out / (HEARTBEAT + ".new")
        waiting.write_text(json.dumps(told))
        os.replace(waiting, self.out / HEARTBEAT)
        self._write_steps(progress.metrics)

    def _write_steps(self, metrics: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(row) + "\n" for row in metrics[self._steps_written :])
        file = self.out / STEPS
        if self._steps_written:
            with file.open("a") as steps:
                steps.write(lines)
        else:  # these workers are new: a reader of the old file finds out by its inode
            waiting = file.with_suffix(".new")
            waiting.write_text(lines)
            os.replace(waiting, file)
        self._steps_written = len(metrics)

    def save(self, progress: checkpoint.Progress) -> None:
        """Has a checkpoint stored beside the next steps."""
        assert self.updater is not None
        state = self.updater.state()
        if state is not None:
            self._checkpoints.put(state, progress.snapshot())

    def finish(
        self,
        facts: dict[str, Any],
        state: dict[str, torch.Tensor] | None = None,
        neurons: Neurons | None = None,
    ) -> None:
        """Leaves the result, on rank 0, once every worker has called it."""
        self._checkpoints.close()
        torch.distributed.barrier()
        if self.plan.worker != 0:
            return
        with checkpoint.whole(self.job.result) as folder:
            if state is not None and neurons is not None:
                values = {name: state[f"{name}.values"] for name, _ in neurons.named_values()}
                base = neurons.selection.base or fingerprint(self.job.base)
                delta.save(folder / DELTA, values, neurons.selection, base)
            self.mark("finished")
            (folder / FACTS).write_text(json.dumps(facts | {"timeline": self.timeline}))
