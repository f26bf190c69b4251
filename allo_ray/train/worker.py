"""One training worker: builds the policy, finds its place in the run, trains, reports. Runs inside Ray Train."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow.fs import LocalFileSystem

from allo_ray import tables
from allo_ray.errors import UserError
from allo_ray.metrics import TrainMetrics
from allo_ray.models import fingerprint
from allo_ray.neurons import delta
from allo_ray.neurons.parametrize import Neurons, attach
from allo_ray.neurons.selection import Selection
from allo_ray.train import checkpoint
from allo_ray.train.forward import Policy, load_model
from allo_ray.train.job import DELTA, FACTS, HEARTBEAT, KEPT, LOGPROBS, RESULT, RUN, STEPS, TrainJob
from allo_ray.train.kept import kept_tokens
from allo_ray.train.logprobs import record_logprobs
from allo_ray.train.loop import Plan, run
from allo_ray.train.process import masters_of, prepare_process
from allo_ray.train.rows import Row, global_batches
from allo_ray.train.updater import Updater

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


def run_worker(job: TrainJob, steps: int, out: Path, rows: Iterable[pa.Table]) -> None:
    """Trains to the end and reports the result.

    An error of the user's is reported as the result too, since Ray would try again what cannot succeed.
    """
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    gpu = job.trainer.num_gpus > 0
    prepare_process(job.trainer.threads, gpu)
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
    reporter = _Reporter(out, job.base, plan)
    reporter.mark("worker_started")
    try:
        policy, neurons = build(job, device)
        reporter.mark("model_loaded")
        updater = _make_updater(policy, neurons, job)
        progress = _resume(updater, out / RUN)
        resumed_at = progress.step
        reporter.updater = updater
        reporter.mark("engine_built")
        batches = reporter.clocked(global_batches(rows, job.config.batch_size, progress.step))
        progress = run(updater, plan, batches, progress, _add_up(device), reporter.on_step, reporter.save)
        if job.pairs is not None:
            turn, budget = (plan.worker, plan.workers), plan.micro_batch_tokens
            sharded = job.trainer.zero_stage == 3 and plan.workers > 1
            record_logprobs(updater.forward, job.pairs, out / LOGPROBS, budget, device, turn, sharded)
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
        "timeline": reporter.timeline,
        "metrics": progress.metrics,
    }
    reporter.finish(facts, state, neurons)


def _make_updater(policy: Policy, neurons: Neurons, job: TrainJob) -> Updater:
    from allo_ray.train.zero import ZeroUpdater

    return ZeroUpdater(policy, neurons, job.config, job.trainer)


def _resume(updater: Updater, run_folder: Path) -> checkpoint.Progress:
    """Loads the newest whole checkpoint of this run: the one that rank 0 sees, on every worker.

    Ray Train registers checkpoints when its controller next looks; one that is stored but not yet registered counts.
    """
    found = [checkpoint.latest(run_folder)]
    torch.distributed.broadcast_object_list(found, src=0)
    if found[0] is None:
        return checkpoint.Progress()
    state, progress = checkpoint.load(found[0])
    updater.load(state)
    return progress


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

    def __init__(self, out: Path, base: str, plan: Plan) -> None:
        self.out, self.base, self.plan = out, base, plan
        self.updater: Updater | None = None
        #: When each part of the start-up was done, seconds since the epoch.
        self.timeline: dict[str, float] = {}
        self.last_rows: list[Row] = []
        self._metrics = TrainMetrics(out.name) if plan.worker == 0 else None
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
        """Notes that a part of the start-up is done."""
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
        """Hands a checkpoint to Ray Train, which stores it beside the next steps."""
        import ray.train
        from ray.train import Checkpoint, CheckpointUploadMode

        assert self.updater is not None
        state, reached = self.updater.state(), progress.snapshot()
        if state is None:
            ray.train.report({"step": reached.step})
            return

        def write(_: Checkpoint, name: str) -> Checkpoint:
            folder = self.out / RUN / name
            checkpoint.save(folder, state, reached)
            return Checkpoint(str(folder), LocalFileSystem())

        ray.train.report(
            {"step": reached.step},
            checkpoint=Checkpoint.from_directory(str(self.out)),
            checkpoint_dir_name=f"step-{reached.step:08d}",
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=write,
            delete_local_checkpoint_after_upload=False,
        )

    def finish(
        self,
        facts: dict[str, Any],
        state: dict[str, torch.Tensor] | None = None,
        neurons: Neurons | None = None,
    ) -> None:
        """Reports the result as the run's last checkpoint; every worker has to call it."""
        import ray.train
        from ray.train import Checkpoint

        if self.plan.worker != 0:
            ray.train.report({})
            return

        def write(_: Checkpoint, name: str) -> Checkpoint:
            place = self.out / RUN / name
            with checkpoint.whole(place) as folder:
                if state is not None and neurons is not None:
                    values = {name: state[f"{name}.values"] for name, _ in neurons.named_values()}
                    base = neurons.selection.base or fingerprint(self.base)
                    delta.save(folder / DELTA, values, neurons.selection, base)
                (folder / FACTS).write_text(json.dumps(facts))
            return Checkpoint(str(place), LocalFileSystem())

        ray.train.report(
            {},
            checkpoint=Checkpoint.from_directory(str(self.out)),
            checkpoint_dir_name=RESULT,
            checkpoint_upload_fn=write,
            delete_local_checkpoint_after_upload=False,
        )
