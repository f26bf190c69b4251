"""Asks every model the questions of all suites and scores the answers; one pool of engines serves all models."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa

from allo_ray import tables
from allo_ray.config.data import SuiteConfig, VerifyConfig
from allo_ray.config.engine import JudgeConfig, SamplingConfig
from allo_ray.config.jobs import EvalJob
from allo_ray.data.inference import Job
from allo_ray.data.inference import run as answer
from allo_ray.data.inference_work import SampleWork
from allo_ray.data.templates import render
from allo_ray.data.tokenise import Tokeniser
from allo_ray.data.verify import Verifier
from allo_ray.engines.base import Sampling
from allo_ray.errors import UserError
from allo_ray.models import ModelRef, fingerprint
from allo_ray.neurons.export import export
from allo_ray.stages.base import Context, Progress, Stage, artifact_model
from allo_ray.stages.judged import judge_answers
from allo_ray.store import local_path
from evals.suites.registry import load_suite


def run(ctx: Context) -> None:
    """Writes evals/<label>.parquet for each input. Answers of one model are an artifact of their own (`answers`).

    So a run that changes one model asks only that one again.
    """
    settings = ctx.settings["evaluate"]
    suites = [SuiteConfig(**suite) for suite in settings["suites"]]
    models = {label: artifact_model(artifact, ctx.store) for label, artifact in ctx.inputs.items()}
    tokeniser = Tokeniser(str(local_path(next(iter(models.values())).base)))
    asked = {suite.title: questions(suite, ctx.config.data.template, tokeniser) for suite in suites}
    prompts = tables.PROMPTS.build([row for rows in asked.values() for row in rows])
    sampling = SamplingConfig(**settings["sampling"])
    told = {
        "questions": sorted(prompts["id"].to_pylist()),
        "sampling": settings["sampling"],
        **ctx.settings["engine"],
    }
    keys = {label: ctx.store.key(ANSWERS, 1, told, {"model": item.key}) for label, item in ctx.inputs.items()}
    with ExitStack() as leases:
        for key in sorted(set(keys.values())):
            leases.enter_context(ctx.store.lease(ANSWERS, key))
        missing = {label: key for label, key in keys.items() if ctx.store.find(ANSWERS, key) is None}
        if missing and len(prompts):
            _answer(ctx, {label: (missing[label], models[label]) for label in missing}, prompts, sampling)
    ctx.facts["models"] = list(models)
    ctx.facts["counts"] = {title: len(rows) for title, rows in asked.items()}
    verify = VerifyConfig(**ctx.settings["verify"])
    answers: dict[str, list[dict[str, Any]]] = {}
    for label, key in keys.items():
        found = ctx.store.find(ANSWERS, key)
        samples = (
            tables.SAMPLES.read(local_path(found.file("samples"))) if found else tables.SAMPLES.build([])
        )
        given = dict(zip(samples["prompt_id"].to_pylist(), samples["text"].to_pylist(), strict=True))
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
    answer(jobs, config.engine, progress)
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


def _answer(
    ctx: Context, missing: dict[str, tuple[str, ModelRef]], prompts: pa.Table, sampling: SamplingConfig
) -> None:
    """Answers all questions with the models that have no answers yet, and publishes them."""
    work = SampleWork(
        Sampling(sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.stop), 1, 0
    )
    jobs = []
    exports = ctx.out / "models"
    for label, (key, model) in missing.items():
        folder = ctx.store.work_folder(ANSWERS, key)
        jobs.append(Job(prompts, _folder(model, exports / label), work, str(folder / "samples"), key))
    facts = answer(jobs, ctx.config.engine, ctx.progress)
    for told, (key, _) in zip(facts, missing.values(), strict=True):
        ctx.store.publish(ANSWERS, key, {"facts": told, "seconds": told["seconds"], "startup_seconds": 0})
    ctx.startup_seconds = max(told["startup_seconds"] for told in facts)
    shutil.rmtree(exports, ignore_errors=True)


def _folder(model: ModelRef, scratch: Path) -> str:
    """A folder with the model's weights: its own where nothing was trained since, else one for the time."""
    if not model.deltas:
        return model.base
    export(local_path(model.base), [local_path(delta) for delta in model.deltas], scratch)
    return str(scratch)


#: Artifacts of one model's answers.
ANSWERS = "answers"
EVALUATE = Stage("evaluate", 1, run)
