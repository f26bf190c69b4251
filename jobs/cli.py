"""`allo <job> ...`: the same as `python -m jobs.<job> ...`."""

from __future__ import annotations

import sys
from importlib import import_module

from allo_ray.errors import UserError
from allo_ray.session import quiet

#: Job -> what it does. Every one is a module of this package with a function main(arguments) -> exit code.
JOBS = {
    "align": "align a model: the whole method, from data to report",
    "tune": "search fields of a run: many trials that share their stages",
    "sample": "sample responses to many prompts, resumable",
    "score": "log-probabilities of given responses, token by token, resumable",
    "eval": "answer and score evaluation suites with any model",
    "export": "rebuild a full model from a base and sparse deltas",
    "submit": "run one of these jobs on a cluster: checked first, followed to its end",
    "jobs": "the jobs of a cluster: list, logs, stop, report",
    "doctor": "check this machine, and say what to do about each problem",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the named job; user errors are one line on stderr and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: allo JOB [options]      (allo JOB --help)\n")
        for name, purpose in JOBS.items():
            print(f"  {name:8} {purpose}")
        return 0
    job = arguments[0]
    if job not in JOBS:
        print(f"allo: no job '{job}'. There are: {', '.join(JOBS)}", file=sys.stderr)
        return 2
    return guarded(f"jobs.{job}", arguments[1:])


def guarded(module: str, arguments: list[str]) -> int:
    """Runs a job's main(arguments) and turns a user error into a message and exit code 2."""
    quiet()
    try:
        return import_module(module).main(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
