"""Asks every model the questions of all suites and scores the answers, and measures how far it is from the SFT model.

One pool of engines serves all models.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from allo_ray import tables
from allo_ray.config.data import SuiteConfig, VerifyConfig
from allo_ray.config.engine import JudgeConfig, SamplingConfig
from allo_ray.config.jobs import EvalJob
from allo_ray.data.inference import Job
from allo_ray.data.inference import run as inference
from allo_ray.data.inference_work import SCORES, SampleWork, ScoreWork, Work
from allo_ray.data.templates import render
from allo_ray.data.tokenise import Tokeniser
from allo_ray.data.verify import Verifier
from allo_ray.engines.base import Sampling
from allo_ray.errors import UserError
from allo_ray.models import ModelRef, fingerprint
from allo_ray.neurons.export import export
from allo_ray.stages.answers import answer
from allo_ray.stages.base import Context, Progress, Stage, artifact_model
from allo_ray.stages.divergence import divergence, rows_to_score
from allo_ray.stages.judged import judge_answers
from allo_ray.store import Artifact, local_path
from evals.suites.registry import load_suite


@dataclass(frozen=True)
class _Task:
    """What every model is asked. The answers of one model are an artifact of their own, named `stage`.

    `told`: all that decides them, apart from the model.
    """

    stage: str
    rows: pa.Table
    work: Work
    told: dict[str, Any]


def run(ctx: Context) -> None:
    """Writes evals/<label>.parquet for each input `model <label>`, and the KL divergence from the first to the facts.

    Answers and log-probs of one model are artifacts of their own: a run that changes one model asks only that one
    again. The divergence needs the inputs `prompts` and `samples` (see `allo_ray.stages.divergence`).
    """
    settings = ctx.settings["evaluate"]
    suites = [SuiteConfig(**suite) for suite in settings["suites"]]
    inputs = {
        role.removeprefix(MODEL_ROLE): item
        for role, item in ctx.inputs.items()
        if role.startswith(MODEL_ROLE)
    }
    models = {label: artifact_model(artifact, ctx.store) for label, artifact in inputs.items()}
    tokeniser = Tokeniser(str(local_path(next(iter(models.values())).base)))
    asked = {suite.title: questions(suite, ctx.config.data.template, tokeniser) for suite in suites}
    tasks = [_answering([row for rows in asked.values() for row in rows], settings["sampling"])]
    scored_rows = None
    if "samples" in ctx.inputs and settings["kl_samples"]:
        samples = ctx.file("samples", "samples")
        scored_rows = rows_to_score(ctx.file("prompts", "prompts.parquet"), samples, settings["kl_samples"])
        told = {"samples": ctx.inputs["samples"].key, "count": settings["kl_samples"]}
        tasks.append(_Task(LOGPROBS, scored_rows, ScoreWork(logprobs=True), told))
    keys = {
        (label, task.stage): ctx.store.key(
            task.stage, 1, {**task.told, **ctx.settings["engine"]}, {"model": item.key}
        )
        for label, item in inputs.items()
        for task in tasks
    }
    _ask(ctx, models, tasks, keys)
    found = {place: ctx.store.find(place[1], key) for place, key in keys.items()}
    ctx.facts["models"] = list(models)
    ctx.facts["counts"] = {title: len(rows) for title, rows in asked.items()}
    if scored_rows is not None:
        ctx.facts["kl"] = _divergences({label: found[label, LOGPROBS] for label in models}, scored_rows)
    verify = VerifyConfig(**ctx.settings["verify"])
    answers: dict[str, list[dict[str, Any]]] = {}
    for label in models:
        there = found[label, ANSWERS]
        table = (
            tables.SAMPLES.read(local_path(there.file(tables.SAMPLES.name)))
            if there
            else tables.SAMPLES.build([])
        )
        given = dict(zip(table["prompt_id"].to_pylist(), table["text"].to_pylist(), strict=True))
        answers[label] = [row for suite in suites for row in scored(suite, asked[suite.title], given, verify)]
    ctx.facts["judged"] = sorted(judged := judged_suites(suites, ctx.config.evaluate.judge))
    if judged:
        assert ctx.config.evaluate.judge is not None, "checked by judged_suites"
        ctx.facts["without_verdict"] = judge_answers(ctx.config.evaluate.judge, answers, judged)
    for label, rows in answers.items():
        tables.EVALS.write(rows, ctx.out / "evals" / f"{label}.parquet")


def judged_suites(suites: Sequence[SuiteConfig], judge: JudgeConfig | None) -> set[str]:
    """Titles of the suites whose answers a judge compares.

    Raises:
        UserError: there is one, and no judge; or a suite is unknown or incomplete.
    """
    titles = {suite.title for suite in suites if load_suite(suite).verifier == "judge"}
    if titles and judge is None:
        raise UserError(
            f"evaluate.suites: {', '.join(sorted(titles))} need a judge. Give evaluate.judge: {{url, model}} of an "
            "OpenAI-compatible endpoint, or leave these suites out."
        )
    return titles


def evaluate_folders(
    config: EvalJob, folders: Mapping[str, str], out: Path, progress: Progress
) -> dict[str, list[dict[str, Any]]]:
    """EVALS rows by label, for models that lie in folders; answers are kept under `out`, so that a run resumes."""
    judged_suites(config.suites, config.judge)
    tokeniser = Tokeniser(next(iter(folders.values())))
    asked = {suite.title: questions(suite, config.template, tokeniser) for suite in config.suites}
    prompts = tables.PROMPTS.build([row for rows in asked.values() for row in rows])
    sampling = config.sampling
    work = SampleWork(
        Sampling(sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.stop), 1, 0
    )
    jobs = [
        Job(prompts, folder, work, str(out / "answers" / label), fingerprint(folder))
        for label, folder in folders.items()
    ]
    inference(jobs, config.engine, progress)
    rows: dict[str, list[dict[str, Any]]] = {}
    for label, job in zip(folders, jobs, strict=True):
        samples = job.shards.read()
        given = dict(zip(samples["prompt_id"].to_pylist(), samples["text"].to_pylist(), strict=True))
        rows[label] = [
            row for suite in config.suites for row in scored(suite, asked[suite.title], given, config.verify)
        ]
    if judged := judged_suites(config.suites, config.judge):
        assert config.judge is not None, "checked by judged_suites"
        judge_answers(config.judge, rows, judged)
    return rows


def questions(suite: SuiteConfig, template: str, tokeniser: Tokeniser) -> list[dict[str, Any]]:
    """The questions of a suite as rows of PROMPTS."""
    rows = []
    for number, item in enumerate(load_suite(suite).rows(suite.split)):
        if suite.limit is not None and number == suite.limit:
            break
        text = render(suite.template or template, item["prompt"], tokeniser.hf)
        rows.append(
            {
                "id": tables.content_id(suite.title, text),
                "prompt": item["prompt"],
                "text": text,
                "prompt_ids": tokeniser.prompt(text),
                "reference": item["reference"],
                "answer": item["answer"],
                "group": suite.title,
            }
        )
    if not rows:
        raise UserError(f"evaluate.suites: {suite.title} has no questions in its split {suite.split}")
    return rows


def scored(
    suite: SuiteConfig, rows: list[dict[str, Any]], given: dict[str, str], verify: VerifyConfig
) -> list[dict[str, Any]]:
    """EVALS rows: each question with the model's response and whether it is right."""
    kind = load_suite(suite).verifier
    verifier = Verifier(verify.model_copy(update={"kind": kind})) if kind != "judge" else None
    out = []
    for row in rows:
        response = given.get(row["id"], "")
        answer_given, correct = None, False
        if verifier is not None:
            answer_given, correct = verifier.check(row["prompt"], response, row["answer"])
        out.append(
            {
                "suite": suite.title,
                "id": row["id"],
                "prompt": row["prompt"],
                "response": response,
                "answer": answer_given,
                "reference": row["answer"],
                "correct": bool(correct),
            }
        )
    return out


def _answering(rows: list[dict[str, Any]], sampling: dict[str, Any]) -> _Task:
    config = SamplingConfig(**sampling)
    work = SampleWork(Sampling(config.temperature, config.top_p, config.max_tokens, config.stop), 1, 0)
    told = {"questions": sorted(row["id"] for row in rows), "sampling": sampling}
    return _Task(ANSWERS, tables.PROMPTS.build(rows), work, told)


def _ask(
    ctx: Context, models: dict[str, ModelRef], tasks: list[_Task], keys: dict[tuple[str, str], str]
) -> None:
    """Has answered what the store does not hold yet, all of it by one pool of engines."""
    jobs: dict[tuple[str, str], Job] = {}
    exports = ctx.out / "models"
    for label, model in models.items():  # model by model: weights are swapped once for each
        missing = [
            task
            for task in tasks
            if len(task.rows) and ctx.store.find(task.stage, keys[label, task.stage]) is None
        ]
        folder = _folder(model, exports / label) if missing else ""
        for task in missing:
            key = keys[label, task.stage]
            out = str(ctx.store.work_folder(task.stage, key) / task.work.table.name)
            jobs[task.stage, key] = Job(task.rows, folder, task.work, out, key)
    if not jobs:
        return
    have_answered = ctx.desk.answer if ctx.desk else answer
    ctx.startup_seconds, ctx.waited_seconds = have_answered(jobs, ctx.config.engine, ctx.store, ctx.progress)
    shutil.rmtree(exports, ignore_errors=True)


def _divergences(found: dict[str, Artifact | None], rows: pa.Table) -> dict[str, dict[str, float | None]]:
    """Label -> KL(first model || this one) from the published log-probs of `rows`."""
    prompt_of = dict(zip(rows["id"].to_pylist(), rows["prompt_id"].to_pylist(), strict=True))
    totals: dict[str, dict[str, float]] = {}
    for label, artifact in found.items():
        table = SCORES.read(local_path(artifact.file(SCORES.name))) if artifact else SCORES.build([])
        pairs = zip(table["id"].to_pylist(), table["logprobs"].to_pylist(), strict=True)
        totals[label] = {name: math.fsum(logprobs) for name, logprobs in pairs}
    start = next(iter(totals.values()))
    return {label: divergence(start, total, prompt_of) for label, total in totals.items()}


def _folder(model: ModelRef, scratch: Path) -> str:
    """A folder with the model's weights: its own where nothing was trained since, else one for the time."""
    here = model.here
    if not here.deltas:
        return here.base
    export(Path(here.base), [Path(delta) for delta in here.deltas], scratch)
    return str(scratch)


#: Roles of the inputs that are models: this and the model's label.
MODEL_ROLE = "model "
#: Artifacts of one model's answers, and of its log-probs of the SFT model's samples.
ANSWERS, LOGPROBS = "answers", "sample_logprobs"
EVALUATE = Stage("evaluate", 2, run)
