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

    from allo_ray.capacity import check_engines
    from allo_ray.data.inference import Job, run
    from allo_ray.data.inference_work import SampleWork
    from allo_ray.data.prepare import in_place, prepare_prompts
    from allo_ray.data.prepared import prepared_once
    from allo_ray.data.sources import fingerprint as fingerprint_of_data
    from allo_ray.data.templates import render
    from allo_ray.data.tokenise import Tokeniser
    from allo_ray.data.verify import Verifier
    from allo_ray.engines.base import Sampling
    from allo_ray.estimate import check_engine
    from allo_ray.models import cached_model, fingerprint, parameter_count
    from allo_ray.reach import check_results
    from allo_ray.report.terminal import Progress
    from allo_ray.session import chatter_to, cluster
    from allo_ray.store import hand_over, work_beside

    folder, work = cached_model(config.model), work_beside(config.out)
    tokeniser = Tokeniser(str(folder))
    render(config.data.template, "a question", tokeniser.hf)
    if config.verify is not None:
        Verifier(config.verify)
    check_engine(config.engine, parameter_count(folder), "model.path", config.cluster.address)
    asked, prompts, drops = config.sample, work / "prompts.parquet", work / "drops.parquet"
    # What decides the rows, wherever the same data lies.
    settings = {"template", "columns", "split", "args", "limit", "max_prompt_tokens"}
    source = config.data.model_dump(mode="json", include=settings)
    sampling = Sampling(asked.temperature, asked.top_p, asked.max_tokens, asked.stop)
    job = Job(
        prompts,
        str(folder),
        SampleWork(sampling, asked.n, config.seed, config.verify),
        f"{config.out}/samples",
        fingerprint(folder),
        source | {"content": fingerprint_of_data(config.data)},
    )
    params = job.params(config.engine)
    job.shards.check(params)

    def write() -> dict[str, int]:
        return prepare_prompts(
            config.data,
            tokeniser,
            prompts,
            drops,
            verify=config.verify,
            needs_reference=config.verify is not None,
        )

    early = in_place(config.data)
    counts = prepared_once([prompts, drops], params, write) if early else {}
    with (
        chatter_to(work / "run.log", stderr=True) as terminal,
        cluster(config.cluster, config.engine.pool.num_gpus),
    ):
        check_results(config.out, work)
        check_engines(config.engine, config.cluster)
        counts = counts if early else prepared_once([prompts, drops], params, write)
        with Progress(terminal) as lines, lines.stage("sample") as line:
            facts = run([job], config.engine, line)[0]
    hand_over([drops], config.out)
    print(json.dumps(facts | {"prompts": counts}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(guarded("jobs.sample", sys.argv[1:]))
