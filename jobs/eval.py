"""Answers evaluation suites with one or several models of one architecture, scores them, and prints the table.

allo eval --config my.yaml          (sections: out, models, suites, sampling, engine; see allo_ray/config/jobs.py)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jobs.cli import guarded


def main(arguments: list[str]) -> int:
    """Writes evals/<label>.parquet and scores.json under `out`, and prints accuracies with 95 % intervals."""
    parser = argparse.ArgumentParser("allo eval", description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="such as suites.0.limit=100"
    )
    told = parser.parse_args(arguments)

    from allo_ray.config.jobs import EvalJob
    from allo_ray.config.load import load_as

    config = load_as(EvalJob, told.config, told.set)

    from dataclasses import asdict

    from rich.console import Console

    from allo_ray import tables
    from allo_ray.capacity import check_engines
    from allo_ray.models import cached_model
    from allo_ray.reach import check_results
    from allo_ray.report.terminal import Progress, closing
    from allo_ray.results import compare
    from allo_ray.session import cluster
    from allo_ray.stages.evaluate import evaluate_folders, judged_suites

    folders = {label: str(cached_model(model)) for label, model in config.models.items()}
    out = Path(config.out)
    with cluster(config.cluster, config.engine.pool.num_gpus):
        check_results(config.out, out)
        check_engines(config.engine, config.cluster)
        with Progress(Console(stderr=True)) as lines, lines.stage("evaluate") as line:
            answers = evaluate_folders(config, folders, out, line)
    for label, rows in answers.items():
        tables.EVALS.write(rows, out / "evals" / f"{label}.parquet")
    judged = sorted(judged_suites(config.suites, config.judge))
    scores, comparisons = compare(
        {label: tables.EVALS.build(rows) for label, rows in answers.items()}, judged
    )
    told_scores = [asdict(score) | {"accuracy": score.accuracy} for score in scores]
    (out / "scores.json").write_text(json.dumps(told_scores, indent=1))
    closing(Console(), scores, comparisons, {"scores": out / "scores.json"})
    return 0


if __name__ == "__main__":
    sys.exit(guarded("jobs.eval", sys.argv[1:]))
