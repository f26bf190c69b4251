"""Sampling and scoring as resumable batch jobs: Ray Data streams rows through a pool of engine actors.

    read -> drop rows that have a result -> cut into batches -> engine actors (min to max) -> figures to the driver

Results never pass through the driver: each actor publishes its batch as a shard (see `allo_ray.data.shards`), and the
driver sees one row of figures for it. A job that is run again does what is missing; what is there is not touched.
Several jobs with models of one architecture share the actors, which swap weights between them: evaluating four models
starts one engine, not four.

Own actors in `map_batches`, not `ray.data.llm`: that needs ray[serve], starts its engine in a process of its own (35 s
instead of 12 on a CPU), keeps only the first of n samples, and drops token ids and prompt log-probs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import ray
from ray.exceptions import RayActorError

from allo_ray.config.base import bounds, semantic
from allo_ray.config.data import VerifyConfig
from allo_ray.config.engine import EngineConfig
from allo_ray.data.inference_actor import ANSWERED, JOB, Assignment, InferenceActor
from allo_ray.data.inference_work import SampleWork, ScoreWork, Work
from allo_ray.data.shard_index import Answered, hash_ids
from allo_ray.data.shards import Shards
from allo_ray.data.tally import Tally, gauges, rates
from allo_ray.data.task_errors import users_error
from allo_ray.engines.base import Sampling, model_facts
from allo_ray.engines.build import engine_environment
from allo_ray.errors import UserError

#: Rows that kill their engine are given up; more than this share of all rows (and than ten) stops the job.
MAX_KILLED = 0.01
#: Files that one index file names: a job that was killed opens at most so many shards when it goes on.
INDEXED_FILES = 1024


class Progress(Protocol):
    def update(self, done: int, total: int, unit: str, **facts: Any) -> None: ...


@dataclass(frozen=True)
class Job:
    """One model, what it is asked, about which rows, and where the answers go.

    Attributes:
        rows: Parquet file or folder, a table, or a dataset, with the columns that the work reads.
        model: folder of the model; `model_id` names it in the job's parameters (its fingerprint, say).
        out: folder or URL of the shards.
        source: what the rows were made from, where the folder must not take rows that were made otherwise.
    """

    rows: str | Path | pa.Table | ray.data.Dataset
    model: str
    work: Work
    out: str
    model_id: str = ""
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shards(self) -> Shards:
        return Shards(str(self.out), self.work.table, self.work.key)

    def params(self, engine: EngineConfig) -> dict[str, Any]:
        """Everything that decides the answers, as JSON: of the engine all but its resources."""
        told = {
            "work": self.work.told(),
            "model": self.model_id or str(self.model),
            "engine": semantic(engine),
        }
        return told | ({"source": dict(self.source)} if self.source else {})


def sample(
    prompts: str | Path | pa.Table | ray.data.Dataset,
    model: str,
    engine: EngineConfig,
    sampling: Sampling,
    n: int,
    out: str,
    *,
    seed: int = 0,
    verify: VerifyConfig | None = None,
    model_id: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draws n responses to every prompt (rows of PROMPTS) into SAMPLES shards at `out`; returns figures, see `run`."""
    job = Job(prompts, model, SampleWork(sampling, n, seed, verify), out, model_id)
    return run([job], engine, progress)[0]


def score(
    rows: str | Path | pa.Table | ray.data.Dataset,
    model: str,
    engine: EngineConfig,
    out: str,
    *,
    logprobs: bool = False,
    model_id: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores every token of the responses of `rows` (id, context_ids, response_ids); see `ScoreWork` and `run`."""
    return run([Job(rows, model, ScoreWork(logprobs), out, model_id)], engine, progress)[0]


def run(jobs: Sequence[Job], engine: EngineConfig, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Runs jobs whose models have one architecture and whose rows have one schema, on one pool of actors.

    Returns, and writes as `summary.json` beside the shards, for each job:
        rows, skipped (had a result or were rejected already), rejected_total (by this run and those before it);
        of this run: rejected, killed (rejected because their engine died on them); tokens_in, tokens_out; seconds
        (steady state), startup_seconds (until the first engine was ready), engine_seconds (of it in the engine
        itself), tokens_in_per_second, tokens_out_per_second; actors; cached (share of the prompt tokens).

    Raises:
        UserError: an id occurs twice; a folder holds results of other parameters; the models differ in architecture;
            too many rows kill their engine.
    """
    _check_architectures(jobs)
    started = time.time()
    counts, parts, assignments = [], [], []
    for number, job in enumerate(jobs):
        shards = job.shards
        shards.claim(job.params(engine))
        rows = _open(job)
        done = shards.done()
        total, missing = count_rows(job, done)
        counts.append({"rows": total, "skipped": total - missing})
        assignments.append(Assignment(str(job.model), job.work, shards))
        if missing:
            parts.append(rows.map_batches(_Missing(ray.put(done), number), batch_format="pyarrow"))
    tallies = [Tally() for _ in jobs]
    if parts:
        whole = parts[0].union(*parts[1:]) if parts[1:] else parts[0]
        total = sum(count["rows"] for count in counts)
        finished = sum(count["skipped"] for count in counts)
        limit = max(10, MAX_KILLED * total)
        indexes = [_Index(assignment.shards) for assignment in assignments]
        try:
            for told in _stream(whole, engine, assignments):
                tally = tallies[told[JOB]]
                tally.add(told)
                indexes[told[JOB]].add(told[ANSWERED])
                finished += told["rows"]
                if progress is not None:
                    doing = gauges(tallies, bounds(engine.pool.actors)[1])
                    progress.update(finished, total, "rows", **rates(tallies), **doing)
                if sum(one.sums["killed"] for one in tallies) > limit:
                    raise UserError(
                        f"{jobs[told[JOB]].out}: more than {limit:.0f} rows killed their engine; see rejected/ there. "
                        "The model does not fit the memory, or its rows are not what it reads."
                    )
        finally:
            for index in indexes:
                index.write()
        assert finished >= total, f"{total - finished} of {total} rows were never read"
    out = []
    for job, count, tally in zip(jobs, counts, tallies, strict=True):
        rejected = {row.id for row in job.shards.rejected()}
        facts = {"table": str(job.out), **count, "rejected_total": len(rejected), **tally.summary(started)}
        job.shards.summarise(facts)
        out.append(facts)
    return out


class _Index:
    """Collects what the actors tell of their files, and writes it down at times."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._waiting: list[Answered] = []
        self._files = 0

    def add(self, told: bytes) -> None:
        self._waiting.append(Answered.from_bytes(told))
        self._files += len(self._waiting[-1].files)
        if self._files >= INDEXED_FILES:
            self.write()

    def write(self) -> None:
        self._shards.index(Answered.join(self._waiting))
        self._waiting, self._files = [], 0


def _stream(
    rows: ray.data.Dataset, engine: EngineConfig, assignments: Sequence[Assignment]
) -> Iterator[dict[str, Any]]:
    pool = engine.pool
    fewest, most = bounds(pool.actors)
    batch = max(1, pool.batch_size // max(assignment.work.requests for assignment in assignments))
    done = rows.repartition(target_num_rows_per_block=batch, strict=True).map_batches(
        InferenceActor,
        fn_constructor_args=(engine, list(assignments)),
        batch_size=None,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(
            min_size=fewest,
            max_size=most,
            # Twice what runs: a pool whose actors cannot be this full never grows (Ray's threshold is 1.75).
            max_tasks_in_flight_per_actor=2 * pool.batches_in_flight,
            max_concurrent_calls_per_actor=pool.batches_in_flight,
            enable_true_multi_threading=True,
        ),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus or None,
        resources=pool.resources or None,
        runtime_env={"env_vars": engine_environment(engine)},
    )
    done.context.enable_progress_bars = False
    # An engine that fails to start (a device still held by a dying process, say) gets one more try.
    done.context.max_consecutive_actor_init_deaths = 1
    try:
        with users_error(done):
            yield from done.iter_rows()
    except RayActorError as error:
        if "creation task" not in str(error):
            raise
        last = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{assignments[0].model}: the {engine.kind} engine does not start: {last}") from None


class _Missing:
    """Keeps the rows without a result, and says which job they belong to."""

    def __init__(self, done: ray.ObjectRef, job: int) -> None:
        self._done, self._job = done, job

    def __call__(self, batch: pa.Table) -> pa.Table:
        kept = batch.filter(pa.array(~_found(ray.get(self._done), batch.column("id").to_pylist())))
        return kept.append_column(JOB, pa.array([self._job] * len(kept), pa.int32()))


def _found(done: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    """Which of `ids` are in the sorted hashes `done`: bool [N]."""
    if not len(done) or not len(ids):
        return np.zeros(len(ids), dtype=bool)
    hashes = hash_ids(ids)
    places = np.minimum(np.searchsorted(done, hashes), len(done) - 1)
    return done[places] == hashes


def _open(job: Job) -> ray.data.Dataset:
    rows = job.rows
    if isinstance(rows, pa.Table):
        rows = ray.data.from_arrow(rows)
    elif not isinstance(rows, ray.data.Dataset):
        return ray.data.read_parquet(str(rows), columns=list(job.work.columns))
    return rows.select_columns(list(job.work.columns))


def _ids(job: Job) -> Iterator[list[str]]:
    """The ids of a job's rows, a bounded number at a time."""
    if isinstance(job.rows, ray.data.Dataset):
        ids = job.rows.select_columns(["id"])
        ids.context.enable_progress_bars = False
        for batch in ids.iter_batches(batch_format="numpy", batch_size=None):
            yield list(batch["id"])
    else:
        table = isinstance(job.rows, pa.Table)
        source = pads.dataset(job.rows if table else str(job.rows), format=None if table else "parquet")
        for batch in source.to_batches(columns=["id"]):
            yield batch.column("id").to_pylist()


def count_rows(job: Job, done: np.ndarray) -> tuple[int, int]:
    """Rows in all and rows without a result. Raises UserError where an id occurs twice."""
    seen = [np.zeros(0, "S12")]
    missing = 0
    for ids in _ids(job):
        missing += int((~_found(done, ids)).sum())
        seen.append(hash_ids(ids))
    hashes = np.sort(np.concatenate(seen))
    twice = hashes[1:][hashes[1:] == hashes[:-1]]
    if len(twice):
        raise UserError(
            f"{job.out}: {len(twice)} ids of the input occur more than once ('{_id_of(job, twice[0])}', say). "
            "Ids must be unique."
        )
    return len(hashes), missing


def _id_of(job: Job, wanted: bytes) -> str:
    """The id whose hash is given."""
    return next(ids[int(at[0])] for ids in _ids(job) if len(at := np.flatnonzero(hash_ids(ids) == wanted)))


def _check_architectures(jobs: Sequence[Job]) -> None:
    def shape(model: str) -> dict[str, Any]:
        facts = model_facts(model)
        return {
            key: facts.get(key) for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
        }

    shapes = {str(job.model): shape(str(job.model)) for job in jobs}
    first = next(iter(shapes))
    for model, told in shapes.items():
        if told != shapes[first]:
            raise UserError(
                f"{model} and {first} differ in architecture ({told}, {shapes[first]}): run them apart."
            )
