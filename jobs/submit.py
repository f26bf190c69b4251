"""`allo submit --address http://HOST:8265 -- align --config my.yaml`: runs a job on a cluster."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from allo_ray.errors import UserError
from jobs.cli import JOBS, guarded

#: Jobs that make no sense on the other side.
HERE_ONLY = ("doctor", "submit", "jobs")


def main(arguments: list[str]) -> int:
    """Checks, sends, and follows the job; returns its exit code, or 0 at once with --no-wait."""
    parser = argparse.ArgumentParser(
        "allo submit",
        description="Runs a job on a Ray cluster.",
        usage="%(prog)s [options] -- JOB [options of the job]",
    )
    parser.add_argument("--address", help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS)")
    parser.add_argument(
        "--working-dir", type=Path, default=Path(), help="what travels with the job (default: here)"
    )
    parser.add_argument(
        "--wait", action=argparse.BooleanOptionalAction, default=True, help="follow the job to its end"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- JOB ...")
    told = parser.parse_args(arguments)
    command = told.command[1:] if told.command[:1] == ["--"] else told.command
    if not command or command[0] not in JOBS or command[0] in HERE_ONLY:
        names = ", ".join(name for name in JOBS if name not in HERE_ONLY)
        raise UserError(f"say which job to run after `--`: {names}")

    from allo_ray import submit

    submit.check_command(command, told.working_dir)
    client = submit.connect(told.address)
    job = submit.submit(client, command, told.working_dir)
    print(f"sent as {job}", flush=True)
    if not told.wait:
        print(f"allo jobs logs {job}    allo jobs stop {job}    allo jobs report {job}")
        return 0
    try:
        code = submit.follow(client, job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\n{job} goes on without you: allo jobs logs {job}, or allo jobs stop {job}", file=sys.stderr)
        return 130
    print(f"{job} ended with exit code {code}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(guarded("jobs.submit", sys.argv[1:]))
