"""The actor of a batch job: owns one engine, answers batches of rows, publishes each batch as a shard.

Several batches are under way at once, so that the engine never runs dry at the end of one. A batch whose earlier
attempt ended with the engine's death is answered row by row; a row that then kills the engine again, alone, is
given up with the reason, and the rest goes on. An engine that was lost with its node is no row's fault.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import ray

from allo_ray.config.engine import EngineConfig
from allo_ray.data.inference_work import Answers, Row, Work
from allo_ray.data.shard_index import Answered
from allo_ray.data.shards import Rejected, Shards, name_of
from allo_ray.engines.base import Engine, EngineDied
from allo_ray.engines.build import build_engine
from allo_ray.errors import UserError
from allo_ray.metrics import EngineMetrics
from allo_ray.reach import alive_nodes, expect

#: Column of the input that tells which job a row belongs to.
JOB = "_job"
#: Column of the figures: which files were written and which rows they answer, see `shard_index`.
ANSWERED = "_answered"


def private_bytes() -> int:
    """Resident memory of this process without what it shares with others (the object store, libraries)."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Assignment:
    """One job as its actors see it."""

    model: str
    work: Work
    shards: Shards


class InferenceActor:
    """Callable class of `Dataset.map_batches`: takes a batch of rows, returns one row of figures for each job in it."""

    def __init__(self, config: EngineConfig, assignments: Sequence[Assignment]) -> None:
        for assignment in assignments:
            expect(f"{assignment.shards.url}/params.json")
        self._assignments = assignments
        self._model = assignments[0].model
        self._engine: Engine = build_engine(config, self._model)
        self._ready = time.time()
        self._cpu_before = time.process_time()
        self._turn = threading.Condition()
        self._users = 0
        self._alone = False
        self._node = ray.get_runtime_context().get_node_id()
        self._metrics = EngineMetrics(self._engine.gauges)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        told = []
        for number in sorted({row[JOB] for row in rows}):
            told.append(self._serve(number, [row for row in rows if row[JOB] == number]))
        return pa.Table.from_pylist(told)

    def _serve(self, number: int, rows: list[Row]) -> dict[str, Any]:
        assignment = self._assignments[number]
        shards = assignment.shards
        name = name_of([row["id"] for row in rows])
        started = time.time()
        rejected: list[Rejected] = []
        written: dict[str, list[str]] = {}  # file -> ids of the rows that it answers
        good = []
        for row in rows:
            problem = assignment.work.problem(row, self._engine.max_model_len)
            if problem is None:
                good.append(row)
            else:
                rejected.append(Rejected(row["id"], "invalid", problem))
        if rejected:
            written[shards.reject(name, rejected)] = [row.id for row in rejected]
        tokens = [0, 0]
        if good and not shards.has(name):
            answers: Answers | str = ""
            if not shards.deaths(name, alive_nodes):
                with self._using(assignment.model):
                    answers = self._attempt(assignment, name, good)
            if isinstance(answers, str):
                with self._using(assignment.model, alone=True):
                    answers = self._one_by_one(assignment, good, rejected, written)
            tokens = [answers.tokens_in, answers.tokens_out]
            if answers.rows:
                answered = {row[assignment.work.key] for row in answers.rows}
                written[shards.publish(name, answers.rows)] = sorted(answered)
            shards.end(name)
        self._metrics.batch(PurePosixPath(shards.url).parent.name, len(rows), *tokens)
        return {
            JOB: number,
            ANSWERED: Answered.of(list(written), list(written.values())).to_bytes(),
            "rows": len(rows),
            "rejected": len(rejected),
            "killed": sum(row.kind == "killed" for row in rejected),
            "tokens_in": tokens[0],
            "tokens_out": tokens[1],
            "started": started,
            "ended": time.time(),
            "ready": self._ready,
            "engine_seconds": self._engine.startup_seconds,
            "actor": f"{self._node} {os.getpid()}",
            "cpu_seconds": time.process_time() - self._cpu_before,
            "private_bytes": private_bytes(),
            **self._engine.gauges(),
        }

    def _one_by_one(
        self,
        assignment: Assignment,
        rows: Sequence[Row],
        rejected: list[Rejected],
        written: dict[str, list[str]],
    ) -> Answers:
        """Answers rows that were in a batch that failed; those that fail alone too go to `rejected` and `written`."""
        shards, done = assignment.shards, Answers([], 0, 0)
        for row in rows:
            name = name_of(["alone", row["id"]])
            if (kept := shards.kept(name)) is not None:
                done.rows.extend(kept)
                continue
            deaths = shards.deaths(name, alive_nodes)
            answers = "" if deaths else self._attempt(assignment, name, [row])
            if isinstance(answers, Answers):
                shards.keep(name, answers.rows)
                shards.end(name)
                done = Answers(
                    done.rows + answers.rows,
                    done.tokens_in + answers.tokens_in,
                    done.tokens_out + answers.tokens_out,
                )
            else:
                kind, reason = (
                    ("killed", f"its engine died twice: {deaths[-1]}") if deaths else ("invalid", answers)
                )
                rejected.append(Rejected(row["id"], kind, reason))
                # Its attempts stay noted: should another row end this pass too, the next one knows of this row.
                written[shards.reject(name, rejected[-1:])] = [row["id"]]
        return done

    def _attempt(self, assignment: Assignment, name: str, rows: Sequence[Row]) -> Answers | str:
        """Answers rows; returns why not where the engine refuses one. Where it dies, so do we."""
        assignment.shards.begin(name, self._node)
        try:
            return assignment.work.answer(self._engine, rows)
        except UserError:
            raise
        except ValueError as error:
            assignment.shards.end(name)
            return str(error)
        except (EngineDied, RuntimeError, MemoryError) as error:
            # What the engine holds is lost, perhaps its memory too: a fresh process takes over, and finds this note.
            assignment.shards.blame(name, self._node, repr(error))
            os._exit(1)

    @contextmanager
    def _using(self, model: str, alone: bool = False) -> Iterator[None]:
        """Holds the engine at a model's weights; waits until the batches that use other weights are done.

        `alone` waits until all others are done and keeps them out, so that a death has only one suspect.
        """
        with self._turn:
            self._turn.wait_for(
                lambda: not self._users or (self._model == model and not alone and not self._alone)
            )
            if self._model != model:
                self._engine.load_weights(model)
                self._model = model
            self._users += 1
            self._alone = alone
        try:
            yield
        finally:
            with self._turn:
                self._users -= 1
                self._alone = False
                self._turn.notify_all()
