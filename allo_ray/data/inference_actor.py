"""The actor of a batch job: owns one engine, answers batches of rows, publishes each batch as a shard.

Several batches are under way at once, so that the engine never runs dry at the end of one. A batch whose earlier
attempt ended with the engine's death is answered row by row; a row that then kills the engine again, alone, is
given up with the reason, and the rest goes on.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from allo_ray.config.engine import EngineConfig
from allo_ray.data.inference_work import Answers, Row, Work
from allo_ray.data.shards import Rejected, Shards, name_of
from allo_ray.engines.base import Engine, EngineDied
from allo_ray.engines.build import build_engine

#: Column of the input that tells which job a row belongs to.
JOB = "_job"


@dataclass(frozen=True)
class Assignment:
    """One job as its actors see it."""

    model: str
    work: Work
    shards: Shards


class InferenceActor:
    """Callable class of `Dataset.map_batches`: takes a batch of rows, returns one row of figures for each job in it."""

    def __init__(self, config: EngineConfig, assignments: Sequence[Assignment]) -> None:
        self._assignments = assignments
        self._model = assignments[0].model
        self._engine: Engine = build_engine(config, self._model)
        self._ready = time.time()
        self._turn = threading.Condition()
        self._users = 0

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
        good = []
        for row in rows:
            problem = assignment.work.problem(row, self._engine.max_model_len)
            if problem is None:
                good.append(row)
            else:
                rejected.append(Rejected(row["id"], "invalid", problem))
        if rejected:
            shards.reject(name, rejected)
        tokens_in = tokens_out = 0
        if good and not shards.has(name):
            with self._using(assignment.model):
                deaths = shards.begin(name)
                answers = None if deaths else self._attempt(assignment, name, good)
                if answers is not None:
                    tokens_in, tokens_out = answers.tokens_in, answers.tokens_out
                else:
                    tokens_in, tokens_out, killed = self._one_by_one(assignment, good)
                    rejected.extend(killed)
                shards.end(name)
        return {
            JOB: number,
            "rows": len(rows),
            "rejected": len(rejected),
            "killed": sum(row.kind == "killed" for row in rejected),
            "tokens_in": tokens_in,
            "tokens_out": tokens_out,
            "started": started,
            "ended": time.time(),
            "ready": self._ready,
            "engine_seconds": self._engine.startup_seconds,
            "actor": os.getpid(),
            **self._engine.gauges(),
        }

    def _one_by_one(self, assignment: Assignment, rows: Sequence[Row]) -> tuple[int, int, list[Rejected]]:
        tokens_in = tokens_out = 0
        killed = []
        for row in rows:
            shards, name = assignment.shards, name_of(["alone", row["id"]])
            if shards.has(name):
                continue
            deaths = shards.begin(name)
            answers = None if deaths else self._attempt(assignment, name, [row], alone=True)
            if answers is not None:
                tokens_in, tokens_out = tokens_in + answers.tokens_in, tokens_out + answers.tokens_out
            else:
                killed.append(Rejected(row["id"], "killed", f"the engine died on it twice: {deaths[-1]}"))
                shards.reject(name, killed[-1:])
            shards.end(name)
        return tokens_in, tokens_out, killed

    def _attempt(
        self, assignment: Assignment, name: str, rows: Sequence[Row], alone: bool = False
    ) -> Answers | None:
        try:
            answers = assignment.work.answer(self._engine, rows)
        except (EngineDied, RuntimeError, MemoryError) as error:
            # What the engine holds is lost and its memory may be too: a fresh process takes over, and finds this note.
            assignment.shards.blame(name, repr(error))
            os._exit(1)
        assignment.shards.publish(name, answers.rows)
        return answers

    @contextmanager
    def _using(self, model: str) -> Iterator[None]:
        """Holds the engine at a model's weights; waits until the batches that use other weights are done."""
        with self._turn:
            self._turn.wait_for(lambda: self._model == model or not self._users)
            if self._model != model:
                self._engine.load_weights(model)
                self._model = model
            self._users += 1
        try:
            yield
        finally:
            with self._turn:
                self._users -= 1
                self._turn.notify_all()
