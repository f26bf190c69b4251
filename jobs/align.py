"""Aligns a model: `allo align --config quickstart`, or `ray job submit ... -- python -m jobs.align --config ...`."""

from __future__ import annotations

import argparse
import sys

from jobs.cli import guarded


def main(arguments: list[str]) -> int:
    """Runs or, with --dry-run, explains a config."""
    parser = argparse.ArgumentParser("allo align", description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, or a preset by name")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as learn.k=0.1")
    parser.add_argument(
        "--dry-run", action="store_true", help="print config, stages and estimates; start nothing"
    )
    told = parser.parse_args(arguments)

    from allo_ray.config.load import load

    config = load(told.config, told.set)

    from allo_ray.session import quiet

    quiet()
    from allo_ray import align

    if told.dry_run:
        align.explain(config)
    else:
        align.align(config)
    return 0


if __name__ == "__main__":
    sys.exit(guarded("jobs.align", sys.argv[1:]))
