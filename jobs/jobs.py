"""`allo jobs`: the jobs of a cluster: lists them, shows a log, stops one, fetches its report."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.cli import guarded


def main(arguments: list[str]) -> int:
    """Runs one of list, logs, stop, report."""
    parser = argparse.ArgumentParser("allo jobs", description="The jobs of a Ray cluster.")
    parser.add_argument("--address", help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS)")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="every job with its state (the default)")
    actions.add_parser("logs", help="follow a job; exits with its code").add_argument("job")
    actions.add_parser("stop", help="end a job; its finished stages stay in the store").add_argument("job")
    report = actions.add_parser("report", help="copy a job's report to this machine")
    report.add_argument("job")
    report.add_argument(
        "--to", type=Path, default=Path("report.html"), help="file to write (default: report.html)"
    )
    told = parser.parse_args(arguments)

    from allo_ray import submit

    client = submit.connect(told.address)
    if told.action in (None, "list"):
        show(client.list_jobs(), Console())
        return 0
    submit.find(client, told.job)
    if told.action == "logs":
        return submit.follow(client, told.job, lambda text: print(text, end="", flush=True))
    if told.action == "stop":
        stopped = client.stop_job(told.job)
        print(f"{told.job} {'is being stopped' if stopped else 'had ended already'}")
        return 0
    print(f"written to {submit.fetch_report(client, told.job, told.to)}")
    return 0


def show(details: list, console: Console) -> None:
    """One row a submitted job, the latest first (`details`: ray's JobDetails, times in ms since 1970)."""
    table = Table(box=None, pad_edge=False)
    for column in ("job", "state", "started", "minutes"):
        table.add_column(column, no_wrap=True)
    table.add_column("command", overflow="fold")
    for job in sorted(details, key=lambda job: -(job.start_time or 0)):
        if not job.submission_id:
            continue
        begun = (job.start_time or time.time() * 1000) / 1000
        ended = (job.end_time or time.time() * 1000) / 1000
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime(begun))
        table.add_row(
            job.submission_id, str(job.status), started, f"{(ended - begun) / 60:.1f}", job.entrypoint
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(guarded("jobs.jobs", sys.argv[1:]))
