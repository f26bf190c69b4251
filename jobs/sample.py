"""Samples n responses to every prompt, on as many actors as the cluster has room for; run again, it goes on.

allo sample --config my.yaml        (sections: out, model, data, engine, sample, verify; see allo_ray/config/jobs.py)
"""

from __future__ import annotations

import argparse
import json
import sys

from jobs.cli import guarded


def main(arguments: list[str]) -> int:
    """Reads the prompts, samples, and prints the summary as JSON."""
    parser = argparse.ArgumentParser("allo sample", description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as sample.n=4")
    told = parser.parse_args(arguments)

    from allo_ray.config.jobs import SampleJob
    from allo_ray.config.load import load_as

    config = load_as(SampleJob, told.config, told.set)

    from rich.console import Console

    from allo_ray.data.inference import sample
    from allo_ray.data.prepare import prepare_prompts
    from allo_ray.data.tokenise import Tokeniser
    from allo_ray.engines.base import Sampling
    from allo_ray.models import cached_model, fingerprint
    from allo_ray.reach import check_results
    from allo_ray.report.terminal import Progress
    from allo_ray.session import cluster
    from allo_ray.store import work_beside

    work, folder = work_beside(config.out), cached_model(config.model)
    with cluster(config.cluster, config.engine.pool.num_gpus):
        check_results(config.out, work)
        prompts = work / "prompts.parquet"
        drops = work / "drops.parquet"
        needed = config.verify is not None
        prepare_prompts(
            config.data, Tokeniser(str(folder)), prompts, drops, verify=config.verify, needs_reference=needed
        )
        with Progress(Console(stderr=True)) as lines, lines.stage("sample") as line:
            facts = sample(
                prompts,
                str(folder),
                config.engine,
                Sampling(
                    config.sample.temperature,
                    config.sample.top_p,
                    config.sample.max_tokens,
                    config.sample.stop,
                ),
                config.sample.n,
                f"{config.out}/samples",
                seed=config.seed,
                verify=config.verify,
                model_id=fingerprint(folder),
                progress=line,
            )
    print(json.dumps(facts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(guarded("jobs.sample", sys.argv[1:]))
