"""Jobs on a Ray cluster: checked before they are sent, followed while they run.

Wraps Ray's `JobSubmissionClient`. What would fail on the cluster after minutes is found here in seconds: an address
where nothing answers, a missing token, another Ray version, a working directory with data in it, a config that is
wrong or that keeps its results where the next node cannot see them.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import re
import shlex
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from allo_ray.config.jobs import EvalJob, SampleJob, ScoreJob
from allo_ray.config.load import load, load_as
from allo_ray.config.tune import load_campaign
from allo_ray.doctor import listening, supported
from allo_ray.errors import UserError
from allo_ray.session import TOKEN_WANTED

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

#: Code is far smaller. Ray itself refuses 500 MiB, after minutes of packing.
MOST_BYTES = 100 << 20
#: Seconds that a cluster may stay away from who follows a job.
AWAY_SECONDS = 60
RUNTIME_ENV = Path("cluster") / "runtime_env.yaml"
#: Jobs that do one part of the method, whose results every node has to reach at `out`.
PARTS = {"sample": SampleJob, "score": ScoreJob, "eval": EvalJob}
#: Jobs with a config; the first two have `store` and `runs`.
WITH_CONFIG = ("align", "tune", *PARTS)


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster whose dashboard answers at `address` (default: RAY_API_SERVER_ADDRESS).

    A token in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token is sent along unless RAY_AUTH_MODE says no.

    Raises:
        UserError: no address; nothing answers; no or a wrong token; another Ray version than here; a Python version
            for which allo_ray is not made.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise UserError("no cluster: give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS")
    if "://" not in address:
        address = f"http://{address}"
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https"):
        raise UserError(
            f"--address {address}: jobs go to the dashboard, http://HOST:8265 (not {parts.scheme}://)"
        )
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        raise UserError(f"--address {address}: the port is no number; give http://HOST:8265") from None
    if not listening(parts.hostname or "", port, timeout=5):
        raise UserError(
            f"--address {address}: nothing answers there. Is the cluster up, and the dashboard forwarded "
            "(`kubectl port-forward service/NAME-head-svc 8265` or `ray dashboard cluster/aws.yaml`)?"
        )
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if "RAY_AUTH_MODE" not in os.environ and ("RAY_AUTH_TOKEN" in os.environ or token.is_file()):
        os.environ["RAY_AUTH_MODE"] = "token"  # read when ray is imported

    import ray
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)  # its steps are ours: they show once, in our words
    try:
        client = JobSubmissionClient(address)
        version = (
            client._server_ray_version
        )  # asked for when the client was made; get_version() is the API's own
    except AuthenticationError:
        raise UserError(f"{address} {TOKEN_WANTED}") from None
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"--address {address}: no Ray dashboard answers ({str(error).splitlines()[0]})"
        ) from None
    if version != ray.__version__:
        raise UserError(
            f"{address} runs Ray {version}, this environment has {ray.__version__}. Use a cluster image built from "
            f"this checkout (cluster/Dockerfile.*), or `pip install ray=={version}` here."
        )
    python = python_of(client)
    if python is not None and not supported(tuple(int(part) for part in python.split(".")[:2])):
        raise UserError(
            f"{address} runs Python {python}; allo_ray needs 3.11 to 3.13. Use an image built from this checkout "
            "(cluster/Dockerfile.*)."
        )
    return client


def python_of(client: JobSubmissionClient) -> str | None:
    """The cluster's Python version, None where it does not tell. It may be another than here: jobs run there alone."""
    try:
        answer = client._do_request("GET", "/api/v0/cluster_metadata")
        return str(answer.json()["data"]["pythonVersion"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def package(folder: Path) -> dict[str, Any]:
    """The runtime environment that sends `folder` along: its cluster/runtime_env.yaml, if it has one, and itself.

    Raises:
        UserError: no such folder, or more than 100 MiB in it; names the largest files.
    """
    if not folder.is_dir():
        raise UserError(f"--working-dir {folder}: no such folder")
    settings = _settings(folder)
    files = travelling_files(folder, settings.get("excludes", []))
    total = sum(size for _, size in files)
    if total > MOST_BYTES:
        largest = sorted(files, key=lambda entry: -entry[1])[:5]
        listed = "".join(
            f"\n  {size >> 20} MiB  {path.relative_to(folder.resolve())}" for path, size in largest
        )
        raise UserError(
            f"--working-dir {folder} holds {total >> 20} MiB, at most {MOST_BYTES >> 20} may travel with a job. Put "
            "data and models on storage that the cluster reaches, and name the rest in .rayignore. The largest:"
            f"{listed}"
        )
    return {**settings, "working_dir": str(folder)}


def _settings(folder: Path) -> dict[str, Any]:
    """The folder's own cluster/runtime_env.yaml."""
    file = folder / RUNTIME_ENV
    return (yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}


def travelling_files(folder: Path, excludes: Sequence[str]) -> list[tuple[Path, int]]:
    """(file, bytes) of what Ray would pack from `folder`, by Ray's own rules for excludes and ignore files."""
    from ray._private.runtime_env import packaging

    folder = folder.resolve()
    found: list[tuple[Path, int]] = []

    def note(path: Path) -> None:
        if path.is_file():
            found.append((path, path.stat().st_size))

    rules = [packaging._get_excludes(folder, list(excludes))] if excludes else []
    packaging._dir_travel(folder, rules, note, include_gitignore=True)
    return found


def check_command(command: Sequence[str], folder: Path) -> None:
    """Checks the config that `command` (job and its options) will use, if it is a file or preset here.

    Raises:
        UserError: the config is wrong; it does not travel with the job; a folder that it names for results is a
            relative path, which on a cluster lies in the job's own temporary folder.
    """
    if command[0] not in WITH_CONFIG:
        return
    source = _option(command, "--config")
    if source is None or source.startswith("/") or "://" in source:
        return  # the cluster's own file: checked there
    if Path(source).suffix:
        if not (folder / source).is_file():
            raise UserError(
                f"--config {source}: no such file in the working directory {folder.resolve()}, so it cannot travel"
            )
        excludes = _settings(folder).get("excludes", [])
        place = Path(os.path.normpath(folder.resolve() / source))  # a link travels as what it points to
        if place not in {path for path, _ in travelling_files(folder, excludes)}:
            raise UserError(
                f"--config {source}: it does not travel, for {RUNTIME_ENV}, .rayignore or .gitignore leave it out. "
                "Copy it to a folder that does, beside what it refers to."
            )
    local = folder / source if Path(source).suffix else source
    overrides = [value for name, value in zip(command, command[1:], strict=False) if name == "--set"]
    overrides += [word.removeprefix("--set=") for word in command if word.startswith("--set=")]
    if command[0] in PARTS:
        url = command[0] != "eval"
        _check_shared(source, "out", load_as(PARTS[command[0]], local, overrides).out, url)
        return
    if command[0] == "tune":
        config, prefix = load_campaign(local, overrides).base, "set."
    else:
        config, prefix = load(local, overrides), ""
    _check_shared(source, f"{prefix}store", config.store, url=True)
    _check_shared(source, f"{prefix}runs", config.runs, url=False)


def _check_shared(source: str, key: str, value: str, url: bool) -> None:
    if not value.startswith("/") and "://" not in value:
        name = key.rpartition(".")[2]
        raise UserError(
            f"{source}: `{key}: {value}` would lie in the job's temporary folder on one node. Name a path that all "
            f"nodes mount{', or a URL' if url else ''}: --set {key}=/shared/{name}"
        )


def submit(client: JobSubmissionClient, command: Sequence[str], folder: Path) -> str:
    """Sends `python -m jobs.<job> <options>` with `folder` and returns the submission id."""
    entrypoint = shlex.join(["python", "-m", f"jobs.{command[0]}", *command[1:]])
    try:
        return client.submit_job(entrypoint=entrypoint, runtime_env=package(folder))
    except (RuntimeError, OSError) as error:
        raise UserError(f"the cluster did not take the job: {str(error).splitlines()[0]}") from None


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], object]) -> int:
    """Writes the job's log as it grows; returns the exit code of the job when it has ended.

    0 for success; the driver's own code, or 1 if it has none, for failure; 143 for a stopped job. A connection
    that breaks is taken up again, without repeating lines; where none stays open the log is asked for every 2 s.

    Raises:
        UserError: the cluster stays away for a minute.
    """
    from aiohttp import ClientError

    written = 0
    away_since: float | None = None

    def show(text: str, position: int) -> None:
        """Text of the log from this position on."""
        nonlocal written, away_since
        away_since = None
        fresh = text[max(0, written - position) :]
        if fresh:
            written = position + len(text)
            write(fresh)

    async def tail() -> None:
        position = 0
        async for chunk in client.tail_job_logs(job):
            show(chunk, position)
            position += len(chunk)

    while True:
        try:
            try:
                asyncio.run(tail())
            except (
                RuntimeError,
                OSError,
                ClientError,
            ):  # it broke, or a proxy lets no such connection through
                time.sleep(2)
                show(client.get_job_logs(job), 0)
            info = client.get_job_info(job)
            away_since = None
        except (RuntimeError, OSError) as error:
            away_since = away_since or time.monotonic()
            if time.monotonic() - away_since > AWAY_SECONDS:
                raise UserError(f"lost the cluster while following {job}: {error}") from None
            continue
        if info.status.is_terminal():
            return exit_code(info)
        time.sleep(1)


def exit_code(info: JobDetails) -> int:
    """The exit code that stands for a finished job."""
    if info.status == "SUCCEEDED":
        return 0
    return 143 if info.status == "STOPPED" else info.driver_exit_code or 1


def find(client: JobSubmissionClient, job: str) -> JobDetails:
    """The job with this submission id.

    Raises:
        UserError: the cluster knows no such job; names those it knows.
    """
    jobs = {details.submission_id: details for details in client.list_jobs() if details.submission_id}
    if job not in jobs:
        raise UserError(f"no job {job} on the cluster; there are: {', '.join(jobs) or 'none'}")
    return jobs[job]


def fetch_report(client: JobSubmissionClient, job: str, target: Path) -> Path:
    """Writes the report of a finished job to `target`, whatever storage only the cluster reaches.

    A small job on the cluster reads it and prints it, compressed, to its log.

    Raises:
        UserError: the job has not said where its report lies, or it is not there; nothing is written then.
    """
    find(client, job)
    told = re.findall(r"^report +(/.*\S)", client.get_job_logs(job), re.MULTILINE)
    if not told:
        raise UserError(f"{job} has not said where its report lies: align and tune say so when they end")
    report = told[-1]
    if target.exists():
        raise UserError(f"{target} exists already: name another file")
    code = (
        "import base64, sys, zlib, fsspec; content = fsspec.open(sys.argv[1]).open().read(); "
        "print('<report>' + base64.b64encode(zlib.compress(content)).decode() + '</report>')"
    )
    reader = client.submit_job(entrypoint=shlex.join(["python", "-c", code, report]))
    while not (info := client.get_job_info(reader)).status.is_terminal():
        time.sleep(1)
    log = client.get_job_logs(reader)
    client.delete_job(reader)
    found = re.search("^<report>([A-Za-z0-9+/=]+)</report>$", log, re.MULTILINE)
    if info.status != "SUCCEEDED" or not found:
        raise UserError(
            f"{job}: no report at {report} ({log.strip().splitlines()[-1] if log.strip() else info.message})"
        )
    target.write_bytes(zlib.decompress(base64.b64decode(found[1])))
    return target


def _option(command: Sequence[str], name: str) -> str | None:
    for index, word in enumerate(command):
        if word == name and index + 1 < len(command):
            return command[index + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None
