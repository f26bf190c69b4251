"""What a campaign leaves in runs/<campaign>/: trials.parquet, best.yaml, report.html, and summary.json."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from allo_ray import tables
from allo_ray.config.load import dump
from allo_ray.config.space import Distribution, Value
from allo_ray.config.tune import Campaign, MeasureConfig
from allo_ray.errors import UserError
from allo_ray.method import LABELS
from allo_ray.report.campaign import render_campaign, saved
from allo_ray.report.trials import CampaignData, Metric, Parameter, StageCost, Trial, front
from allo_ray.store import Store
from allo_ray.tune.measure import broke, value_of
from allo_ray.tune.records import Record, Records, Scores
from allo_ray.tune.search import importances


@dataclass(frozen=True)
class Outcome:
    """A campaign as far as it is: its folder, what summary.json holds, and what the report shows."""

    folder: Path
    summary: dict[str, Any]
    data: CampaignData


def write(campaign: Campaign, records: Records, store: Store, start: Scores) -> Outcome:
    """Writes everything from the records, of a finished campaign or an interrupted one.

    start: scores of the models that all trials share, with the one that they start from.
    """
    folder, data = records.folder, campaign_data(campaign, records, store, start)
    table(data).write(rows(data, records), folder / "trials.parquet")
    (folder / "report.html").write_text(render_campaign(data), encoding="utf-8")
    if data.best_config:
        (folder / "best.yaml").write_text(data.best_config, encoding="utf-8")
    spent, alone = saved(data)
    best = data.trial(data.best)
    states = Counter(record.state for record in records)
    summary = {
        "name": data.name,
        "created": data.created.isoformat(timespec="seconds"),
        "trials": {"asked": campaign.config.total, **states},
        "objective": {
            "name": data.objective.name,
            "goal": campaign.config.objective.goal,
            "start": data.start,
        },
        "best": best and {"number": best.number, "values": dict(best.values), "metrics": dict(best.metrics)},
        "front": [trial.number for trial in _front(data)],
        "importance": dict(data.importance),
        "stages": [
            {"stage": one.name, "ran": one.ran, "reused": one.reused, "seconds": round(one.seconds, 1)}
            for one in data.stages
        ],
        "stage_seconds": {"spent": round(spent, 1), "as_independent_runs": round(alone, 1)},
        "wall_seconds": round(records.wall_seconds, 1),
        "paths": {
            name: str(folder / file)
            for name, file in (("best", "best.yaml"), ("trials", "trials.parquet"), ("report", "report.html"))
            if (folder / file).exists()
        },
    }
    part = folder / "summary.json.part"
    part.write_text(json.dumps(summary, indent=1), encoding="utf-8")
    part.replace(folder / "summary.json")
    return Outcome(folder, summary, data)


def campaign_data(campaign: Campaign, records: Records, store: Store, start: Scores) -> CampaignData:
    """Everything the report shows."""
    config = campaign.config
    ended = [record for record in records if record.state != "running"]
    against = config.second or next((bound for bound in config.constraints if bound.metric == "kl"), None)
    against = against or MeasureConfig(metric="kl", model=config.objective.model)
    measures = {measure.words: measure for measure in (config.objective, against, *config.constraints)}
    trials = [_trial(campaign, record, measures) for record in ended]
    has_second = any(against.words in trial.metrics for trial in trials)
    best = _best(campaign, trials)
    values = next((trial.values for trial in trials if trial.number == best), None)
    return CampaignData(
        name=config.name,
        created=datetime.now(UTC),
        model=campaign.base.model.path,
        parameters=[_parameter(name, told) for name, told in config.space.items()],
        trials=trials,
        objective=_metric(config.objective),
        against=_metric(against) if has_second and against.words != config.objective.words else None,
        start=_value(config.objective, start, LABELS["backbone"]),
        importance=importances(config, ended),
        best=best,
        stages=costs(ended, store),
        wall_seconds=records.wall_seconds,
        constraints=[bound.told for bound in config.constraints],
        best_config="" if values is None else best_config(campaign, values),
    )


def best_config(campaign: Campaign, values: Mapping[str, Value]) -> str:
    """The config of one trial as YAML that `allo align` takes as it is."""
    run = campaign.run(values)
    header = f"# The best trial of the campaign {campaign.config.name}:  allo align --config best.yaml\n\n"
    return header + dump(run.model_copy(update={"name": f"{campaign.config.name}-best"}))


def costs(ended: Sequence[Record], store: Store) -> list[StageCost]:
    """How often each stage was needed by the trials that ended, how many artifacts that took, and their mean seconds.

    An artifact counts once, also where an earlier run had made it.
    """
    used: dict[str, Counter[str]] = defaultdict(Counter)
    for record in ended:
        for path in record.artifacts.values():
            stage, _, key = path.partition("/")
            used[stage][key] += 1
    out = []
    for stage, keys in used.items():
        found = [artifact for key in keys if (artifact := store.find(stage, key)) is not None]
        seconds = sum(artifact.seconds for artifact in found) / max(1, len(found))
        out.append(StageCost(stage.replace("_", " "), len(keys), keys.total() - len(keys), seconds))
    return out


def table(data: CampaignData) -> tables.Table:
    """The schema of trials.parquet: a column for each parameter and each metric, by their names in the report."""
    columns = {}
    for item in data.parameters:
        kinds = {type(choice) for choice in item.choices}
        numbers = not item.choices or kinds <= {int, float}
        columns[item.name] = pa.float64() if numbers else pa.bool_() if kinds == {bool} else pa.string()
    metrics = dict.fromkeys(name for trial in data.trials for name in trial.metrics)
    return tables.trials({**columns, **dict.fromkeys(metrics, pa.float64())})


def rows(data: CampaignData, records: Records) -> list[dict[str, Any]]:
    """Rows of `table`, one a trial."""
    errors = {record.number: record.error for record in records}
    columns = table(data).schema
    out = []
    for trial in data.trials:
        told: dict[str, Any] = {
            "number": trial.number,
            "state": trial.state,
            "broke": trial.broke,
            "seconds": trial.seconds,
            "error": errors[trial.number] or None,
        }
        for name in columns.names[len(told) :]:
            value = trial.values.get(name, trial.metrics.get(name))
            text = pa.types.is_string(columns.field(name).type)
            told[name] = value if value is None or not text else str(value)
        out.append(told)
    return out


def _trial(campaign: Campaign, record: Record, measures: Mapping[str, MeasureConfig]) -> Trial:
    """A trial for the report. One that was stopped early has no metrics: its forgotten model is another thing."""
    metrics = {name: _value(measure, record.scores) for name, measure in measures.items()}
    found = {name: value for name, value in metrics.items() if value is not None}
    beyond = record.state == "finished" and broke(campaign.config.constraints, record.scores)
    assert record.state != "running", "left out by the caller"
    return Trial(record.number, record.state, record.values, found, record.seconds, beyond)


def _best(campaign: Campaign, trials: Sequence[Trial]) -> int | None:
    goal = campaign.config.objective
    able = [trial for trial in trials if trial.state == "finished" and not trial.broke]
    sign = 1 if goal.maximise else -1
    return max(able, key=lambda trial: sign * trial.metrics[goal.words]).number if able else None


def _front(data: CampaignData) -> list[Trial]:
    if data.against is None:
        return []
    return front(data.measured(data.objective, data.against), data.objective, data.against)


def _value(measure: MeasureConfig, scores: Scores, label: str | None = None) -> float | None:
    try:
        return value_of(measure, scores, label)
    except UserError:
        return None


def _parameter(name: str, told: Distribution) -> Parameter:
    if told.values:
        return Parameter(name, choices=told.values)
    return Parameter(name, float(told.low), float(told.high), told.kind == "loguniform")


def _metric(measure: MeasureConfig) -> Metric:
    maximise = getattr(measure, "maximise", measure.metric != "kl")
    return Metric(measure.words, cast(bool, maximise), share=measure.metric != "kl")
