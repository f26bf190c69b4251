"""The files for Ray's cluster launcher, the containers and the runtime environment."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from allo_ray import submit

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_the_launcher_accepts_it(name: str) -> None:
    """Ray's own defaults and schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "cluster" / name).read_text()))
    validate_config(config)
    assert config["head_node_type"] == "head"
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token ray start" in " ".join(commands)


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_its_nodes_share_what_a_run_writes(name: str, tmp_path: Path) -> None:
    """Every machine mounts one, its container sees it, and store and runs of the file's own example lie there."""
    text = (ROOT / "cluster" / name).read_text()
    config = yaml.safe_load(text)
    assert config["initialization_commands"][-1].endswith(" /shared")
    assert "-v /shared:/shared" in config["docker"]["run_options"]
    assert config["setup_commands"] == [], "Ray's default would look for another Ray"
    for command in (*config["initialization_commands"], *config["head_start_ray_commands"]):
        subprocess.run(["bash", "-n", "-c", command], check=True)
    [example] = re.findall(r"-- align --config \.\.\. ((?:.|\n)*?/runs)\n", text)
    settings = example.replace("\\\n#", " ").split()
    submit.check_command(["align", "--config", "qa", *settings], tmp_path)


@pytest.mark.parametrize("script", ["local.sh", "slurm.sh"])
def test_a_script_is_valid_shell(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(ROOT / "cluster" / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("build", ["cpu", "gpu"])
def test_the_container_copies_what_exists_and_installs_its_build(build: str) -> None:
    text = (ROOT / "cluster" / f"Dockerfile.{build}").read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), f"Dockerfile.{build} copies {source}"
    assert f"RUN ./setup.sh {build}" in text


def test_versions_are_those_of_the_lock() -> None:
    """The cluster's Ray has to be the client's."""
    locked = re.search(r"^ray==(.*)$", (ROOT / "constraints" / "cpu.txt").read_text(), re.MULTILINE)
    values = (ROOT / "cluster" / "kuberay" / "values.env").read_text()
    assert locked
    assert f"RAY_VERSION={locked[1]}\n" in values


def test_the_runtime_environment_is_one_that_ray_takes() -> None:
    from ray.runtime_env import RuntimeEnv

    settings = yaml.safe_load((ROOT / "cluster" / "runtime_env.yaml").read_text())
    assert RuntimeEnv(**settings)["excludes"]
