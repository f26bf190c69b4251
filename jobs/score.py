"""The probability (or log-prob) of every token of given responses under a model; run again, it goes on.

allo score --config my.yaml         (sections: out, model, rows, columns, engine; see allo_ray/config/jobs.py)
"""

from __future__ import annotations

import argparse
import json
import sys

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

    from allo_ray.capacity import check_engines
    from allo_ray.data.inference import Job, run
    from allo_ray.data.inference_work import ScoreWork
    from allo_ray.data.lookup import stream
    from allo_ray.data.prepared import prepared_once
    from allo_ray.data.reward_rows import write_carried_scores
    from allo_ray.data.sources import content_of
    from allo_ray.data.tokenise import Tokeniser
    from allo_ray.data.user_scores import POLICY_FILE, POLICY_ROWS, in_place, write_user_rows
    from allo_ray.estimate import check_engine
    from allo_ray.models import cached_model, fingerprint, parameter_count
    from allo_ray.reach import check_results
    from allo_ray.report.terminal import Progress
    from allo_ray.session import chatter_to, cluster
    from allo_ray.store import fetch_anew, hand_over, work_beside

    folder, work = cached_model(config.model), work_beside(config.out)
    reward = Tokeniser(str(folder))
    policy_folder = cached_model(config.policy) if config.policy is not None else None
    policy = Tokeniser(str(policy_folder)) if policy_folder is not None else None
    check_engine(config.engine, parameter_count(folder), "model.path", config.cluster.address)
    source = {
        "content": content_of(config.rows),
        "columns": config.columns.model_dump(mode="json"),
        "policy": None if policy_folder is None else fingerprint(policy_folder),
    }
    rows, owned, listed = work / "score_rows.parquet", work / POLICY_FILE, work / "rows.parquet"
    asked = ScoreWork(config.logprobs)
    job = Job(rows, str(folder), asked, f"{config.out}/scores", fingerprint(folder), source)
    params = job.params(config.engine)
    job.shards.check(params)
    prepared, results = [rows, listed] if policy is None else [rows, listed, owned], [listed]

    def write() -> dict[str, int]:
        return write_user_rows(rows, config.rows, config.columns, reward, policy)

    early = in_place(config.rows)
    counts = prepared_once(prepared, params, write) if early else {}
    with (
        chatter_to(work / "run.log", stderr=True) as terminal,
        cluster(config.cluster, config.engine.pool.num_gpus),
    ):
        check_results(config.out, work)
        check_engines(config.engine, config.cluster)
        counts = counts if early else prepared_once(prepared, params, write)
        with Progress(terminal) as lines, lines.stage("score") as line:
            facts = run([job], config.engine, line)[0] | {"input": counts}
        if policy is not None:
            carried, raw = work / "token_scores.parquet", work / "scores"
            if "://" in config.out:
                fetch_anew(f"{config.out}/scores", raw)
            responses = ((row["id"], row["response_ids"]) for row in stream(POLICY_ROWS, owned))
            facts["carried"] = write_carried_scores(
                carried, responses=responses, raw=raw, policy=policy, reward=reward
            )
            results.append(carried)
    hand_over(results, config.out)
    print(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(guarded("jobs.score", sys.argv[1:]))
