"""Searches fields of a run: `allo tune --config campaign`, or `ray job submit ... -- python -m jobs.tune --config ...`.

The same command goes on with an interrupted campaign; with a higher `trials` it goes on with a finished one.
"""

from __future__ import annotations

import argparse
import sys

from jobs.cli import guarded


def main(arguments: list[str]) -> int:
    """Runs or, with --dry-run, explains a campaign."""
    parser = argparse.ArgumentParser("allo tune", description=__doc__)
    parser.add_argument("--config", required=True, help="a campaign's YAML file, or a preset by name")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="such as trials=64 or set.learn.lr=1e-5",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what trials share and what each adds; start nothing"
    )
    told = parser.parse_args(arguments)

    from allo_ray.config.tune import load_campaign

    campaign = load_campaign(told.config, told.set)

    from allo_ray.session import quiet

    quiet()
    from allo_ray.tune import campaign as campaigns

    if told.dry_run:
        campaigns.explain(campaign)
    else:
        campaigns.tune(campaign)
    return 0


if __name__ == "__main__":
    sys.exit(guarded("jobs.tune", sys.argv[1:]))
