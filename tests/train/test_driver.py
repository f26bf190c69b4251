"""Training through Ray Train and DeepSpeed: the same results as the plain loop, on one worker and on two, also when
a worker dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from ray import cloudpickle

from allo_ray import tables
from allo_ray.config.train import TrainConfig, TrainerConfig
from allo_ray.errors import UserError
from allo_ray.neurons import delta
from allo_ray.neurons.selection import Selection
from allo_ray.train import checkpoint, fit
from allo_ray.train.checkpoint import Progress
from allo_ray.train.driver import _claim, train
from allo_ray.train.job import FACTS, HEARTBEAT, LOGPROBS, RUN, TrainJob
from allo_ray.train.logprobs import compute_logprobs
from allo_ray.train.loop import Plan, run
from allo_ray.train.process import clear, peak_rss
from allo_ray.train.rows import Row

CONFIG = TrainConfig(lr=1e-3, batch_size=8, dtype="float32", weight_decay=0.1)
TRAINER = TrainerConfig(
    workers=1, num_cpus=0.5, threads=1, zero_stage=1, micro_batch_tokens=80, checkpoint_every=2
)
ROWS = 150


def write_rows(rows: list[Row], path: Path) -> str:
    tables.TRAIN_ROWS.write(
        [
            {
                "position": at,
                "id": row.id,
                "prompt_ids": row.prompt,
                "chosen_ids": row.chosen,
                "rejected_ids": row.rejected,
                "chosen_reference": row.chosen_reference,
                "rejected_reference": row.rejected_reference,
                "rejected_weight": row.rejected_weight,
            }
            for at, row in enumerate(rows)
        ],
        path,
    )
    return str(path)


@pytest.fixture(scope="module")
def rows(tiny_llama: Path, make_rows, with_reference) -> list[Row]:
    return with_reference(tiny_llama, make_rows(ROWS))


@pytest.fixture(scope="module")
def stored_job(
    tiny_llama: Path, rows: list[Row], make_updater, tmp_path_factory: pytest.TempPathFactory
) -> TrainJob:
    """Masked DPO on a tenth of the neurons over global batches of 8; where it writes is for the test to say."""
    folder = tmp_path_factory.mktemp("job")
    updater = make_updater(tiny_llama, CONFIG)
    updater.neurons.selection.save(folder / "selection.safetensors")
    return TrainJob(
        base=str(tiny_llama),
        layers=(),
        selection=str(folder / "selection.safetensors"),
        rows=write_rows(rows, folder / "rows.parquet"),
        loss="masked_dpo",
        loss_args={"v": 0.3},
        config=CONFIG,
        trainer=TRAINER,
        out="",
    )


@pytest.fixture
def job(stored_job: TrainJob, tmp_path: Path) -> TrainJob:
    return replace(stored_job, out=str(tmp_path / "out"))


def plain(job: TrainJob, folder: Path, rows: list[Row], make_updater) -> dict[str, torch.Tensor]:
    """The same job by the plain loop: values by tensor."""
    updater = make_updater(folder, job.config)
    batches = [rows[at : at + job.config.batch_size] for at in range(0, len(rows), job.config.batch_size)]
    plan = Plan(job.loss, job.loss_args, job.config, len(batches), job.trainer.micro_batch_tokens)
    run(updater, plan, batches, Progress())
    return {name: values.detach() for name, values in updater.neurons.named_values()}


def write_pairs(rows: list[Row], path: Path) -> Path:
    told = {"prompt_id": "", "prompt": "", "text": "", "reference": None, "chosen": "", "rejected": ""}
    told |= {"chosen_source": "sample", "rejected_source": "sample"}
    tables.PAIRS.write(
        [
            told
            | {"id": row.id, "prompt_ids": row.prompt, "chosen_ids": row.chosen, "rejected_ids": row.rejected}
            for row in rows
        ],
        path,
    )
    return path


def furthest(path: Path, values: dict[str, torch.Tensor]) -> float:
    found = delta.load(path)
    assert set(found.counts) == set(values)
    return max(float((found.values(name) - values[name]).abs().max()) for name in values)


class Killer(threading.Thread):
    """Sends SIGKILL to worker 0 or 1 of at most two, once it trains and the checkpoint of step `after` is stored."""

    def __init__(self, out: Path, rank: int = 0, after: int = 8) -> None:
        super().__init__(daemon=True)
        self.out, self.rank, self.after = out, rank, after
        self.killed_at: int | None = None
        self.time = 0.0

    def run(self) -> None:
        while self.killed_at is None:
            time.sleep(0.01)
            try:
                told = json.loads((self.out / HEARTBEAT).read_text())
            except (OSError, ValueError):  # not there yet, or just being replaced
                continue
            if self.after and not (self.out / RUN / f"step-{self.after:08d}").exists():
                continue
            # Worker 0 writes its own number; the other one is found by its name.
            pids = [told["pid"]] if self.rank == 0 else workers() - {told["pid"]}
            if len(pids) == 1:
                os.kill(*pids, signal.SIGKILL)
                self.time = time.time()
                self.killed_at = told["done"]


def workers() -> set[int]:
    """Processes of Ray Train's workers in this session's cluster."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::RayTrainWo"):
                found.add(process.pid)
        except psutil.NoSuchProcess:
            pass
    return found


def short_steps(job: TrainJob, **trainer: Any) -> TrainJob:
    """75 steps of two rows, long enough to be killed, with a checkpoint after every fourth."""
    return replace(
        job,
        config=CONFIG.model_copy(update={"batch_size": 2}),
        trainer=TRAINER.model_copy(update={"checkpoint_every": 4, **trainer}),
    )


def test_a_killed_worker_is_replaced_and_the_result_keeps_its_bits(
    ray_cluster, job: TrainJob, tiny_llama: Path, make_updater, rows: list[Row]
) -> None:
    """Ray Train starts a new worker, which goes on from the last checkpoint; equal to the plain loop bit for bit.

    It holds every CPU of the cluster, and gets its rows all the same.
    """
    job = short_steps(job, num_cpus=ray.cluster_resources()["CPU"])
    killer = Killer(Path(job.out))
    killer.start()
    recorded: list[Any] = []
    result = train(job, record=recorded.extend)
    assert killer.killed_at is not None, "the run ended before it could be killed"
    assert furthest(result.delta, plain(job, tiny_llama, rows, make_updater)) == 0
    metrics = tables.METRICS.read(result.metrics)
    assert metrics["step"].to_pylist() == list(range(75))
    assert recorded[-75:] == metrics.to_pylist()
    assert len(recorded) > 75, "steps are told while the run goes on"
    assert metrics["loss"][0].as_py() == pytest.approx(0.693147, abs=1e-5)
    facts = json.loads((Path(job.out) / "train.json").read_text())
    assert facts["rows"] == ROWS
    assert facts["resumed_at"] >= 4
    assert facts["neurons"] == delta.load(result.delta).count
    assert 0 < facts["startup_seconds"] < facts["seconds"]
    assert sorted(os.listdir(job.out)) == [
        "delta.safetensors",
        "kept.parquet",
        "metrics.parquet",
        "train.json",
    ]


def slow_storage(settings: dict[str, Any]) -> None:
    """What a worker runs where storing a checkpoint takes two seconds; notes how long each step waited for that."""
    from allo_ray.train import checkpoint, fit, worker

    store, save = checkpoint.save, worker._Reporter.save

    def stored(*args: Any) -> None:
        time.sleep(2)
        store(*args)

    def timed(reporter: Any, progress: Progress) -> None:
        began = time.monotonic()
        save(reporter, progress)
        with (reporter.out / "waited").open("a") as file:
            file.write(f"{time.monotonic() - began}\n")

    checkpoint.save, worker._Reporter.save = stored, timed
    try:
        fit._worker(settings)
    finally:
        checkpoint.save, worker._Reporter.save = store, save


def test_steps_do_not_wait_for_a_checkpoint_to_be_stored(
    ray_cluster, job: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """19 steps of milliseconds, a checkpoint after every 6th: storing takes 2 s each, and its step goes on at once."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    monkeypatch.setattr(fit, "_worker", slow_storage)
    slow = replace(job, trainer=job.trainer.model_copy(update={"checkpoint_every": 6}))
    told = train(slow).facts
    waited = [float(line) for line in (Path(job.out) / "waited").read_text().split()]
    assert len(waited) == 3
    assert max(waited) < 1
    assert told["steps"] == 19


def test_a_broken_run_goes_on_when_it_is_run_again_with_other_workers(
    ray_cluster, job: TrainJob, tiny_llama: Path, make_updater, rows: list[Row]
) -> None:
    """One worker under ZeRO 1 dies and may not be replaced; two under ZeRO 3 finish, within 1e-5 of the plain loop.

    The log-probs of pairs that they leave equal those of the trained model computed by a stage of its own.
    """
    from ray.train import TrainingFailedError

    pairs = write_pairs(rows[:30], Path(job.out).with_name("pairs.parquet"))
    job = replace(short_steps(job, max_failures=0), pairs=str(pairs))
    Killer(Path(job.out)).start()
    with pytest.raises(TrainingFailedError):
        train(job)
    result = train(replace(job, trainer=job.trainer.model_copy(update={"workers": 2, "zero_stage": 3})))
    assert furthest(result.delta, plain(job, tiny_llama, rows, make_updater)) < 1e-5
    assert tables.METRICS.read(result.metrics)["step"].to_pylist() == list(range(75))
    assert result.facts["resumed_at"] >= 4
    apart = Path(job.out).with_name("logprobs")
    compute_logprobs(job.base, (str(result.delta),), pairs, apart, "float32", TRAINER)
    left, right = (tables.LOGPROBS.read(found).sort_by("id") for found in (Path(job.out) / LOGPROBS, apart))
    assert left["id"] == right["id"]
    for side in ("chosen", "rejected"):
        for one, other in zip(left[side].to_pylist(), right[side].to_pylist(), strict=True):
            assert one == pytest.approx(other, abs=1e-5)


@pytest.fixture(scope="module")
def two_undisturbed(
    ray_cluster, stored_job: TrainJob, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """Values after 75 steps by two workers that nobody kills."""
    out = str(tmp_path_factory.mktemp("undisturbed"))
    found = delta.load(train(short_steps(replace(stored_job, out=out), workers=2)).delta)
    return {name: found.values(name) for name in found.counts}


def test_the_second_of_two_workers_is_killed_before_the_first_checkpoint(
    job: TrainJob, two_undisturbed: dict[str, torch.Tensor]
) -> None:
    """Both start again from nothing, by themselves; every bit as if nobody had been killed. The first checkpoint is
    never due, so it cannot come first."""
    killer = Killer(Path(job.out), rank=1, after=0)
    killer.start()
    result = train(short_steps(job, workers=2, checkpoint_every=0))
    assert killer.killed_at is not None, "the run ended before it could be killed"
    assert result.facts["resumed_at"] == 0
    assert tables.METRICS.read(result.metrics)["step"].to_pylist() == list(range(75))
    assert furthest(result.delta, two_undisturbed) == 0


def test_the_second_of_two_workers_is_killed_after_a_checkpoint(
    job: TrainJob, two_undisturbed: dict[str, torch.Tensor]
) -> None:
    """What it leaves is finished by two workers to the same bits, and by one within 1e-5 (another order of sums)."""
    from ray.train import TrainingFailedError

    job = short_steps(job, workers=2, max_failures=0)
    Killer(Path(job.out), rank=1).start()
    with pytest.raises(TrainingFailedError):
        train(job)
    alone = replace(job, out=f"{job.out}_alone", trainer=job.trainer.model_copy(update={"workers": 1}))
    shutil.copytree(job.out, alone.out)
    for finishing, furthest_allowed in ((job, 0), (alone, 1e-5)):
        result = train(finishing)
        assert result.facts["resumed_at"] >= 8
        assert tables.METRICS.read(result.metrics)["step"].to_pylist() == list(range(75))
        assert furthest(result.delta, two_undisturbed) <= furthest_allowed


def test_jobs_that_share_workers_train_what_they_train_alone(
    ray_cluster, job: TrainJob, tmp_path: Path, tiny_llama: Path, make_updater, rows: list[Row]
) -> None:
    """One of a tenth of the neurons, one that fails, and one whose worker is killed in the middle, in one run of Ray
    Train: the same bits as by the plain loop; the first is not trained again, and the error is the second one's."""
    other = tmp_path / "other.safetensors"
    Selection.all(["elsewhere.weight"], {"elsewhere.weight": (2, 2)}).save(other)
    first, wrong, last = (replace(job, out=f"{job.out}-{name}") for name in ("first", "wrong", "last"))
    wrong, last = replace(wrong, selection=str(other)), short_steps(last)
    jobs = [(first, 19), (wrong, 19), (last, 75)]
    for one, _ in jobs:
        Path(one.out).mkdir()
        _claim(one, Path(one.out))
    killer = Killer(Path(last.out))
    killer.start()
    began = time.time()
    spent = fit.fit_all(jobs)
    seconds = time.time() - began
    assert killer.killed_at is not None, "the run ended before it could be killed"
    assert json.loads((first.result / FACTS).read_text())["timeline"]["finished"] < killer.time
    # Each has a third of the start, and waits while the others have their turn.
    assert len({one.startup for one in spent}) == 1
    assert all(0 < one.startup < one.startup + one.waited < seconds for one in spent)
    with pytest.raises(UserError, match="the selection holds tensor"):
        train(wrong)
    for one in (first, last):
        result = train(one)
        assert result.spent.startup == result.facts["startup_seconds"] == 0
        assert furthest(result.delta, plain(one, tiny_llama, rows, make_updater)) == 0
    assert result.facts["resumed_at"] >= 4


def test_a_checkpoint_that_waits_gives_way_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the first is being stored three more come: the last of them is stored, and no step has waited. What
    storing raises is raised at the next one."""
    begun, go_on = threading.Event(), threading.Event()

    def slow(folder: Path, *_: Any) -> None:
        begun.set()
        go_on.wait()
        folder.mkdir(parents=True)
        if folder.name.endswith("5"):
            raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save", slow)
    writer = checkpoint.Writer(tmp_path)
    writer.put({}, Progress(1))
    begun.wait()
    for step in (2, 3, 4):
        writer.put({}, Progress(step))
    go_on.set()
    while len(os.listdir(tmp_path)) < 2:
        time.sleep(0.01)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000004"]
    writer.put({}, Progress(5))
    while len(os.listdir(tmp_path)) < 3:
        time.sleep(0.01)
    with pytest.raises(OSError, match="disk full"):
        writer.close()


def test_peaks_count_from_the_beginning_of_a_job() -> None:
    """256 MiB that an earlier job held and gave back are in its peak alone."""
    clear(gpu=False)
    held = torch.ones(64 << 20)
    before = peak_rss()
    del held
    clear(gpu=False)
    assert before - peak_rss() > 200 << 20


def test_what_the_user_can_mend_is_told_before_workers_start(job: TrainJob, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training rows there"):
        train(replace(job, rows=str(tmp_path / "nowhere.parquet")))
    with pytest.raises(UserError, match="loss 'dop' is not known"):
        train(replace(job, loss="dop"))
    with pytest.raises(UserError, match="has no argument w"):
        train(replace(job, loss_args={"w": 1}))
    empty = tmp_path / "empty.parquet"
    tables.TRAIN_ROWS.write([], empty)
    with pytest.raises(UserError, match="is empty"):
        train(replace(job, rows=str(empty)))


def test_an_error_in_a_worker_is_told_once(ray_cluster, job: TrainJob, tmp_path: Path) -> None:
    """A selection of another model: Ray does not try again what cannot succeed."""
    other = tmp_path / "other.safetensors"
    Selection.all(["elsewhere.weight"], {"elsewhere.weight": (2, 2)}).save(other)
    with pytest.raises(UserError, match="the selection holds tensor"):
        train(replace(job, selection=str(other)))


def test_a_node_that_does_not_see_the_folder_is_named(ray_cluster, job: TrainJob) -> None:
    """As on a node that came after the store was checked: here nobody has claimed the folder."""
    unseen = replace(job, out=f"{job.out}-unseen", trainer=TRAINER.model_copy(update={"max_failures": 0}))
    with pytest.raises(UserError, match=rf"{unseen.out}/job\.json: node {socket.gethostname()} does not see"):
        fit.fit_all([(unseen, 19)])


def test_reference_logprobs_of_pairs(
    ray_cluster, tiny_llama: Path, make_rows, with_reference, tmp_path: Path
) -> None:
    """Equal to the plain forward, over several shards; a second call computes nothing. Its actors hold every CPU."""
    rows = with_reference(tiny_llama, make_rows(30))
    pairs = write_pairs(rows, tmp_path / "pairs.parquet")
    out = tmp_path / "logprobs"
    trainer = TRAINER.model_copy(update={"workers": 2, "num_cpus": ray.cluster_resources()["CPU"] / 2})
    for attempt in range(2):
        result = compute_logprobs(str(tiny_llama), (), pairs, out, "float32", trainer)
        assert result.facts["pairs"] == 30
        assert (result.facts["tokens"] > 0) == (attempt == 0)
    found = {row["id"]: row for row in tables.LOGPROBS.read(out).to_pylist()}
    assert len(found) == 30
    for row in rows:
        assert found[row.id]["chosen"] == pytest.approx(row.chosen_reference.tolist(), abs=1e-5)
        assert found[row.id]["rejected"] == pytest.approx(row.rejected_reference.tolist(), abs=1e-5)
