"""The probability (or log-prob) of every token of given responses under a model; run again, it goes on.

allo score --config my.yaml         (sections: out, model, rows, columns, engine; see allo_ray/config/jobs.py)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from jobs.cli import guarded


def main(arguments: list[str]) -> int:
    """Tokenises the rows, scores them, and prints the summary as JSON."""
    parser = argparse.ArgumentParser("allo score", description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="such as logprobs=true"
    )
    told = parser.parse_args(arguments)

    from allo_ray.config.jobs import ScoreJob
    from allo_ray.config.load import load_as

    config = load_as(ScoreJob, told.config, told.set)

    import fsspec
    from rich.console import Console

    from allo_ray.data.inference import score
    from allo_ray.data.reward_rows import write_carried_scores
    from allo_ray.data.tokenise import Tokeniser
    from allo_ray.data.user_scores import user_responses, write_user_rows
    from allo_ray.models import cached_model, fingerprint
    from allo_ray.reach import check_results
    from allo_ray.report.terminal import Progress
    from allo_ray.session import cluster
    from allo_ray.store import local_path, work_beside

    folder = cached_model(config.model)
    rows = work_beside(config.out) / "score_rows.parquet"
    reward = Tokeniser(str(folder))
    policy = Tokeniser(str(cached_model(config.policy))) if config.policy is not None else None
    write_user_rows(rows, config.rows, config.columns, reward, policy)
    with cluster(config.cluster, config.engine.pool.num_gpus):
        check_results(config.out, rows.parent)
        with Progress(Console(stderr=True)) as lines, lines.stage("score") as line:
            facts = score(
                rows,
                str(folder),
                config.engine,
                f"{config.out}/scores",
                logprobs=config.logprobs,
                model_id=fingerprint(folder),
                progress=line,
            )
    if policy is not None:
        carried = rows.with_name("token_scores.parquet")
        responses = user_responses(config.rows, config.columns, policy)
        raw = local_path(f"{config.out}/scores")
        facts["carried"] = write_carried_scores(
            carried, responses=responses, raw=raw, policy=policy, reward=reward
        )
        if rows.parent != Path(config.out):
            files, target = fsspec.core.url_to_fs(f"{config.out}/{carried.name}")
            files.put_file(str(carried), target)
    print(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(guarded("jobs.score", sys.argv[1:]))
