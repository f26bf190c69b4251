"""`allo doctor`: checks this machine and says what to do about each problem.

Exits with 1 when something would stop a run, else with 0.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from allo_ray.doctor import Finding, examine

SIGN = {"ok": "[green]ok[/]", "warn": "[yellow]warning[/]", "block": "[red]problem[/]"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the checks and prints them as a table, or as JSON with --json."""
    parser = argparse.ArgumentParser(
        prog="allo doctor", description="Checks this machine and says what to do about each problem."
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--folder", type=Path, default=Path(), help="where runs will lie (default: here)")
    arguments = parser.parse_args(argv)
    findings = examine(arguments.folder)
    blocked = sum(finding.status == "block" for finding in findings)
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        show(findings, Console())
    return 1 if blocked else 0


def show(findings: list[Finding], console: Console) -> None:
    """Prints the table, and below it each problem with its remedy."""
    table = Table(box=None, pad_edge=False)
    for column in ("check", "", "found"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(finding.name, SIGN[finding.status], finding.detail)
    console.print(table)
    for finding in findings:
        if finding.remedy:
            console.print(f"\n{SIGN[finding.status]} {finding.name}: {finding.remedy}", soft_wrap=True)
    blocked = sum(finding.status == "block" for finding in findings)
    console.print(f"\n{blocked} problem(s) stop a run." if blocked else "\nThis machine is ready.")


if __name__ == "__main__":
    raise SystemExit(main())
