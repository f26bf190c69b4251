"""Teachers that are models: run by engine actors, and behind a real server that speaks the protocol."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from allo_ray.config.engine import EngineConfig, EngineResources, SamplingConfig, TeacherConfig
from allo_ray.data.teachers import Case, EndpointTeacher, ModelTeacher
from allo_ray.data.tokenise import Tokeniser
from allo_ray.endpoint import Endpoint
from allo_ray.errors import UserError

CASES = [Case(f"case{i}", f"Correct {i} + 1 = {i}.\n", f" {i}", f" {i + 1}", str(i + 1)) for i in range(6)]
SAMPLING = SamplingConfig(temperature=0, top_p=1.0, max_tokens=6)
STARTUP_SECONDS = 600


def model_teacher(folder: Path, out: Path, tokeniser: Tokeniser) -> ModelTeacher:
    pool = EngineResources(kv_cache_gib=0.05, max_num_batched_tokens=256, max_num_seqs=8, batch_size=4)
    engine = EngineConfig(kind="transformers", dtype="float32", max_model_len=128, pool=pool)
    return ModelTeacher(str(folder), tokeniser, engine, SAMPLING, out)


def test_a_local_model_answers_every_case_once(
    ray_cluster: None, tiny_llama: Path, tokeniser: Tokeniser, tmp_path: Path
) -> None:
    """A random model rarely ends by itself: what ran into the limit is no rewrite. Asked again, nothing is sampled."""
    teacher = model_teacher(tiny_llama, tmp_path / "answers", tokeniser)
    assert teacher.name == "llama"
    told = dict(teacher.rewrite(CASES))
    assert set(told) == {case.id for case in CASES}
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "answers" / "samples").glob("*.parquet")}
    assert dict(teacher.rewrite(CASES)) == told
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert dict(teacher.rewrite([])) == {}


@pytest.fixture(scope="module")
def served(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of vLLM's server on the tiny model, with a key.

    The module, not the command `vllm serve`: that asks for a package named `vllm`, and the CPU build has another name.
    """
    pytest.importorskip("vllm")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_llama)]
    command += [
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--served-model-name",
        "teacher",
        "--api-key",
        "sk-local",
    ]
    command += ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--max-num-seqs", "8"]
    settings = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }
    log = tmp_path_factory.mktemp("served") / "log"
    with log.open("w") as file:
        server = subprocess.Popen(command, env=settings, stdout=file, stderr=file, start_new_session=True)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        deadline = time.monotonic() + STARTUP_SECONDS
        while not _ready(url):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/models", headers={"Authorization": "Bearer sk-local"}).is_success
    except httpx.HTTPError:
        return False


@pytest.mark.slow
def test_an_endpoint_answers_every_case(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-local")
    told = {
        "kind": "endpoint",
        "url": served,
        "model": "teacher",
        "key_variable": "TEACHER_KEY",
        "concurrency": 3,
    }
    teacher = EndpointTeacher(TeacherConfig.model_validate({**told, "sampling": SAMPLING}))
    first, second = dict(teacher.rewrite(CASES)), dict(teacher.rewrite(CASES))
    assert set(first) == {case.id for case in CASES}
    assert all(isinstance(text, str) and text for text in first.values())
    assert first == second  # greedy
    long = Case("long", "word " * 500, "", "", None)
    assert dict(teacher.rewrite([long, CASES[0]])) == {"long": None, "case0": first["case0"]}


@pytest.mark.slow
def test_a_real_server_refuses_a_wrong_key_and_an_unknown_model(
    served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = [("a", [{"role": "user", "content": "hi"}])]
    with pytest.raises(UserError, match="TEACHER_KEY, which is not set"):
        list(Endpoint(served, "teacher", "TEACHER_KEY").complete(ask))
    monkeypatch.setenv("TEACHER_KEY", "sk-local")
    with pytest.raises(UserError, match=r"no such model \(another\)"):
        list(Endpoint(served, "another", "TEACHER_KEY").complete(ask))
