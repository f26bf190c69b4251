"""`allo align` and `allo tune` where the cluster they are to join does not answer, or not to them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray.exceptions import AuthenticationError

from jobs.cli import guarded

Refused = Callable[[str, str], str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """refused(job, address): what the job says on stderr before it ends with exit code 2."""

    def run(job: str, address: str) -> str:
        config, prefix = ("smoke", "") if job == "align" else ("campaign-smoke", "set.")
        told = {"store": tmp_path / "store", "runs": tmp_path / "runs", "cluster.address": address}
        settings = [f"--set={prefix}{name}={value}" for name, value in told.items()]
        assert guarded(f"jobs.{job}", ["--config", config, *settings]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return run


@pytest.mark.parametrize("job", ["align", "tune"])
def test_a_dead_address_is_told_at_once(refused: Refused, job: str) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"127.0.0.1:{held.getsockname()[1]}"
        assert f"error: cluster.address {address}: nothing answers there" in refused(job, address)


@pytest.mark.parametrize("job", ["align", "tune"])
def test_a_missing_token_is_told_as_one(refused: Refused, job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises a class of its own where there is none. With a wrong one: tests/cluster/test_submit.py."""

    def init(**_: object) -> None:
        raise AuthenticationError("Token authentication is enabled but no authentication token was found")

    monkeypatch.setattr(ray, "init", init)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        said = refused(job, address)
    assert f"error: cluster.address {address} asks for a token" in said
    assert "RAY_AUTH_TOKEN_PATH" in said


def test_an_address_that_is_none_is_told_too(refused: Refused) -> None:
    assert "error: cluster.address 127.0.0.1:gcs: " in refused("align", "127.0.0.1:gcs")
