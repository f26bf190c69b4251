"""Submitting jobs: what is refused before anything is sent, and a job's life on a real cluster."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import ray
from aiohttp import ServerDisconnectedError
from rich.console import Console

from allo_ray import submit
from allo_ray.errors import UserError
from jobs import jobs as jobs_job
from jobs import submit as submit_job
from tests.cluster.conftest import LocalCluster

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_cluster_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "no-token"))


def test_an_address_is_needed() -> None:
    with pytest.raises(UserError, match="--address http://HOST:8265"):
        submit.connect(None)


def test_an_address_where_nothing_listens() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        with pytest.raises(UserError, match="nothing answers there"):
            submit.connect(f"http://127.0.0.1:{held.getsockname()[1]}")


@pytest.mark.parametrize("address", ["127.0.0.1:gcs", "http://127.0.0.1:99999"])
def test_a_port_that_is_none(address: str) -> None:
    with pytest.raises(UserError, match="the port is no number"):
        submit.connect(address)


def test_the_client_port_is_not_the_dashboard() -> None:
    with pytest.raises(UserError, match="jobs go to the dashboard"):
        submit.connect("ray://somewhere:10001")


class Dashboard(BaseHTTPRequestHandler):
    """Answers as a dashboard that runs in these versions."""

    ray, python = "2.9.0", "3.11.2"

    def do_GET(self) -> None:
        told: dict[str, object] = {"version": "4", "ray_version": self.ray, "ray_commit": "x"}
        if self.path == "/api/v0/cluster_metadata":
            told = {"result": True, "data": {"rayVersion": self.ray, "pythonVersion": self.python}}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(told).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], str]]:
    """dashboard(ray, python): address of a dashboard that says so."""
    server = HTTPServer(("127.0.0.1", 0), Dashboard)
    Thread(target=server.serve_forever, daemon=True).start()

    def answer(ray: str, python: str) -> str:
        monkeypatch.setattr(Dashboard, "ray", ray)
        monkeypatch.setattr(Dashboard, "python", python)
        return f"127.0.0.1:{server.server_port}"

    yield answer
    server.shutdown()
    server.server_close()


def test_versions_that_do_not_go_together_are_refused(dashboard: Callable[[str, str], str]) -> None:
    """Ray's has to be the same; Python's, in which the job runs there alone, one that allo_ray is made for."""
    with pytest.raises(UserError, match=r"runs Ray 2\.9\.0, this environment has"):
        submit.connect(dashboard("2.9.0", "3.11.2"))
    for python in ("3.9.18", "3.14.0"):
        with pytest.raises(UserError, match=rf"runs Python {python}; allo_ray needs 3\.11 to 3\.13"):
            submit.connect(dashboard(ray.__version__, python))
    assert submit.python_of(submit.connect(dashboard(ray.__version__, "3.12.1"))) == "3.12.1"


def test_a_heavy_working_directory_is_refused_with_its_largest_file(tmp_path: Path) -> None:
    with (tmp_path / "data.bin").open("wb") as file:
        file.truncate(submit.MOST_BYTES + 1)  # a hole: no disk is used
    with pytest.raises(UserError, match=r"100 MiB  data\.bin"):
        submit.package(tmp_path)
    (tmp_path / ".rayignore").write_text("*.bin\n")
    assert submit.package(tmp_path) == {"working_dir": str(tmp_path)}


def test_the_repository_travels_light_and_without_results() -> None:
    """Code and configs alone: the packages are in the cluster's image."""
    settings = submit.package(ROOT)
    files = submit.travelling_files(ROOT, settings["excludes"])
    names = {str(path.relative_to(ROOT)) for path, _ in files}
    assert {"jobs/cli.py", "allo_ray/errors.py"} <= names
    assert not {name for name in names if name.split("/")[0] in (".git", ".venv", "runs", "store", "tests")}
    assert sum(size for _, size in files) < 10 << 20


def test_a_relative_store_is_refused(tmp_path: Path) -> None:
    """It would lie in the job's temporary folder, which the next run never sees."""
    with pytest.raises(UserError, match="--set store=/shared/store"):
        submit.check_command(["align", "--config", "smoke"], tmp_path)
    settings = ["--set", "store=/shared/store", "--set", "runs=/shared/runs"]
    submit.check_command(["align", "--config", "smoke", *settings], tmp_path)


def test_a_campaign_is_checked_by_its_own_rules(tmp_path: Path) -> None:
    """Store and runs are those of its base."""
    with pytest.raises(UserError, match=r"--set set\.runs=/shared/runs"):
        submit.check_command(
            ["tune", "--config", "campaign-smoke", "--set", "set.store=/shared/store"], tmp_path
        )
    settings = ["--set", "set.store=/shared/store", "--set=set.runs=/shared/runs"]
    submit.check_command(["tune", "--config", "campaign-smoke", *settings], tmp_path)


def test_a_batch_job_is_checked_by_its_own_rules(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {path: 'tiny:llama'}\ndata: {path: x.jsonl}\nout: samples\n")
    with pytest.raises(UserError, match="--set out=/shared/out"):
        submit.check_command(["sample", "--config", "mine.yaml"], tmp_path)
    for out in ("/shared/out", "s3://bucket/out"):
        submit.check_command(["sample", "--config", "mine.yaml", "--set", f"out={out}"], tmp_path)
    (tmp_path / "eval.yaml").write_text(
        "models: {a: {path: 'tiny:llama'}}\nsuites: [{name: arithmetic}]\nout: out\n"
    )
    with pytest.raises(UserError, match=r"Name a path that all nodes mount: --set out=/shared/out"):
        submit.check_command(["eval", "--config", "eval.yaml"], tmp_path)
    with pytest.raises(UserError, match="scores are written to a folder"):
        submit.check_command(["eval", "--config", "eval.yaml", "--set", "out=s3://bucket/out"], tmp_path)
    with pytest.raises(UserError, match="modle"):
        submit.check_command(["sample", "--config", "mine.yaml", "--set", "modle.path=x"], tmp_path)


def test_a_config_that_would_not_travel_is_refused(tmp_path: Path) -> None:
    """It is not there, or what leaves results at home leaves it there too."""
    with pytest.raises(UserError, match="cannot travel"):
        submit.check_command(["align", "--config", "mine.yaml"], tmp_path)
    (tmp_path / "cluster").mkdir()
    shutil.copy(ROOT / submit.RUNTIME_ENV, tmp_path / submit.RUNTIME_ENV)
    best = tmp_path / "runs" / "campaign" / "best.yaml"
    best.parent.mkdir(parents=True)
    best.write_text("extends: smoke\nstore: /shared/store\nruns: /shared/runs\n")
    with pytest.raises(
        UserError, match=r"runs/campaign/best\.yaml: it does not travel, for cluster/runtime_env"
    ):
        submit.check_command(["align", "--config", "runs/campaign/best.yaml"], tmp_path)
    shutil.move(best, tmp_path / "other.yaml")
    (tmp_path / "best.yaml").symlink_to("other.yaml")
    submit.check_command(["align", "--config", "best.yaml"], tmp_path)


def test_a_wrong_config_is_refused_here(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: smoke\nlern: {k: 0.1}\n")
    with pytest.raises(UserError, match="lern"):
        submit.check_command(["align", "--config=mine.yaml"], tmp_path)


@pytest.mark.parametrize("command", [[], ["--"], ["--", "doctor"], ["--", "nothing"]])
def test_only_known_jobs_are_sent(command: list[str]) -> None:
    with pytest.raises(UserError, match="say which job to run"):
        submit_job.main(["--address", "http://127.0.0.1:1", *command])


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", None, 1), ("STOPPED", -15, 143)],
)
def test_exit_codes(status: str, code: int | None, expected: int) -> None:
    info = SimpleNamespace(status=status, driver_exit_code=code)
    assert submit.exit_code(info) == expected  # pyright: ignore[reportArgumentType]


class Flaky:
    """A cluster whose connection breaks in the middle of a log whenever that is followed, an hour apart; no error: it
    does not answer then either. Each tail starts from the beginning."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.now, self.log = error, 0.0, "on"

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    async def tail_job_logs(self, job: str):
        self.now += 3600
        self.log = "one\ntwo\nthree\nfour\n"[: len(self.log) + 6]
        yield self.log[:-1]
        raise self.error or RuntimeError("WebSocket connection closed unexpectedly")

    def get_job_logs(self, job: str) -> str:
        if self.error is None:
            raise RuntimeError("no answer")
        return self.log

    def get_job_info(self, job: str) -> SimpleNamespace:
        status = SimpleNamespace(is_terminal=lambda: self.log.endswith("four\n"))
        return SimpleNamespace(status=status, driver_exit_code=7)


@pytest.fixture
def flaky(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Flaky:
    cluster = Flaky(request.param)
    monkeypatch.setattr(submit, "time", cluster)
    return cluster


@pytest.mark.parametrize(
    "flaky", [RuntimeError("closed"), ServerDisconnectedError()], indirect=True, ids=repr
)
def test_broken_connections_repeat_no_line_and_end_nothing(flaky: Flaky) -> None:
    """Every one of them breaks, for hours, and the log comes all the same."""
    written: list[str] = []
    assert submit.follow(flaky, "job", written.append) == 7  # pyright: ignore[reportArgumentType]
    assert "".join(written) == "one\ntwo\nthree\nfour\n"
    assert flaky.now > 3 * 3600


@pytest.mark.parametrize("flaky", [None], indirect=True)
def test_a_cluster_that_stays_away_is_given_up(flaky: Flaky, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(job: str):
        raise RuntimeError("refused")
        yield ""

    monkeypatch.setattr(flaky, "tail_job_logs", refused)
    with pytest.raises(UserError, match="lost the cluster while following job: no answer"):
        submit.follow(flaky, "job", print)  # pyright: ignore[reportArgumentType]
    assert 60 < flaky.now < 70


def test_the_list_shows_submitted_jobs_latest_first() -> None:
    def job(name: str | None, start: int) -> SimpleNamespace:
        return SimpleNamespace(
            submission_id=name,
            status="SUCCEEDED",
            start_time=start,
            end_time=start + 90_000,
            entrypoint="python x",
        )

    out = io.StringIO()
    jobs_job.show(
        [job("early", 10**12), job(None, 10**12), job("late", 2 * 10**12)], Console(file=out, width=120)
    )
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["late", "early"]
    assert " 1.5 " in lines[1]


# A stand-in for jobs.align: the life of a job is the same, whatever it does.
ALIGN = """
import pathlib, sys, time
print("working on", sys.argv[2], flush=True)
report = pathlib.Path(sys.argv[sys.argv.index("--set") + 1].split("=")[1], "smoke", "report.html")
report.parent.mkdir(parents=True)
report.write_text("<p>done</p>")
print("report   ", report, flush=True)
if "slow" in sys.argv:
    time.sleep(600)
sys.exit(3)
"""


@pytest.mark.slow
def test_the_life_of_a_job_on_a_real_cluster(local_cluster: LocalCluster, tmp_path: Path) -> None:
    """Sent, followed, ended with the job's code, its report fetched; another one stopped; a wrong token refused."""
    code = tmp_path / "code"
    (code / "jobs").mkdir(parents=True)
    (code / "jobs" / "__init__.py").touch()
    (code / "jobs" / "align.py").write_text(ALIGN)

    def allo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "jobs.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=ROOT,
            env={
                **local_cluster.environment,
                "RAY_API_SERVER_ADDRESS": local_cluster.dashboard,
                **environment,
            },
        )

    sending = ["submit", "--working-dir", str(code)]
    job = ["--", "align", "--config", "smoke", "--set"]
    first = allo(*sending, *job, f"runs={tmp_path}/runs", "--set", f"store={tmp_path}/store")
    assert "working on smoke" in first.stdout, first.stdout + first.stderr
    assert first.returncode == 3
    name = first.stdout.split()[2]
    fetched = allo("jobs", "report", name, "--to", str(tmp_path / "report.html"))
    assert fetched.returncode == 0, fetched.stderr
    assert (tmp_path / "report.html").read_text() == "<p>done</p>"

    second = allo(*sending, "--no-wait", *job, f"runs={tmp_path}/2", "--set", f"store={tmp_path}/2", "slow")
    assert second.returncode == 0, second.stderr
    name = second.stdout.split()[2]
    assert allo("jobs", "stop", name).returncode == 0
    assert allo("jobs", "logs", name).returncode == 143
    assert name in allo("jobs").stdout
    assert "no job missing" in allo("jobs", "stop", "missing").stderr

    def python(*lines: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-c", "; ".join(lines)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**local_cluster.environment, "RAY_API_SERVER_ADDRESS": local_cluster.dashboard},
        )

    told = python("from allo_ray import submit", "print(submit.python_of(submit.connect(None)))")
    assert told.stdout.strip() == platform.python_version(), told.stderr
    joining = "cluster(ClusterConfig(address='auto')).__enter__()"
    imports = ("from allo_ray.session import cluster", "from allo_ray.config.run import ClusterConfig")
    told = python("import ray", *imports, "ray.__version__ = '2.9.0'", joining)
    assert re.search(rf"Ray: {ray.__version__} .*Ray: 2\.9\.0 .*Use the cluster's own versions", told.stderr)

    wrong = tmp_path / "wrong-token"
    wrong.write_text("0" * 64)
    os.chmod(wrong, 0o600)
    joining = ["align", "--config", "smoke", "--set", f"runs={tmp_path}/3", "--set", f"store={tmp_path}/3"]
    for command in (["jobs"], joining):
        refused = allo(*command, RAY_AUTH_TOKEN_PATH=str(wrong))
        assert refused.returncode == 2, refused.stderr
        assert "token" in refused.stderr, (
            "Ray tells a driver with a wrong one no more than that it cannot connect"
        )
        assert "Traceback" not in refused.stderr
