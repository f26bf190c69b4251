"""Trackers: what TensorBoard, MLflow and Weights & Biases hold afterwards, read back from their own files."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from allo_ray import track
from allo_ray.config.load import load
from allo_ray.config.run import RunConfig
from allo_ray.errors import UserError

SUMMARY = {
    "wall_seconds": 12.5,
    "models": {
        "SFT": {"held-out": {"accuracy": 0.5, "n": 10}, "kl": {"mean": 0.0, "standard_error": 0.0, "n": 4}},
        "ALLO": {
            "held-out": {"accuracy": 0.75, "n": 10},
            "kl": {"mean": 0.25, "standard_error": 0.1, "n": 4},
        },
    },
}
FINAL = {
    "final/wall_seconds": 12.5,
    "final/held-out/SFT": 0.5,
    "final/held-out/ALLO": 0.75,
    "final/kl/SFT": 0.0,
    "final/kl/ALLO": 0.25,
}


def rows(count: int) -> list[dict[str, Any]]:
    """Steps of a method without a margin; the loss of step i is 1 / (i + 1)."""
    return [{"step": step, "loss": 1 / (step + 1), "margin": None, "tokens": 100} for step in range(count)]


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return load(
        "smoke",
        [
            f"runs={tmp_path}",
            "track={tensorboard: {}, wandb: {mode: offline}}",
            f"track.mlflow.uri={tmp_path}/ml",
        ],
    )


def tell(config: RunConfig, folder: Path) -> list[str]:
    """A run as `align` tells it: two stages side by side, rows that come twice, and a stage from the store."""
    warned: list[str] = []
    with track.opened(config, folder, warned.append) as trackers:
        trackers.steps("warmup", rows(3))
        trackers.steps("baseline r-dpo?", rows(1))
        trackers.steps("warmup", rows(5))
        trackers.steps("sft", rows(2))
        trackers.results(SUMMARY)
    return warned


def wandb_records(file: Path) -> Iterator[Any]:
    """Records of an offline run: a LevelDB log (blocks of 32 KiB) behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = file.read_bytes()
    at, whole = 7, b""
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # full, last
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_all_trackers_hold_every_step_once_and_the_final_scores(run: RunConfig, tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "smoke"
    folder.mkdir()
    assert tell(run, folder) == []
    losses = {"warmup": 5, "sft": 2, "baseline_r-dpo_": 1}

    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    for stage, count in losses.items():
        told = [(event.step, event.value) for event in board.Scalars(f"{stage}/loss")]
        assert told == [(step, pytest.approx(1 / (step + 1))) for step in range(count)]
    assert {name: board.Scalars(name)[0].value for name in FINAL} == pytest.approx(FINAL)
    assert "warmup/margin" not in board.Tags()["scalars"], "what a method does not have is no metric"
    assert "arithmetic" in board.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()

    client = MlflowClient(tracking_uri=f"{tmp_path}/ml")
    experiment = client.get_experiment_by_name("allo_ray")
    assert experiment is not None
    [found] = client.search_runs([experiment.experiment_id])
    assert (found.info.status, found.data.params["learn.k"]) == ("FINISHED", "0.1")
    for stage, count in losses.items():
        history = client.get_metric_history(found.info.run_id, f"{stage}/loss")
        assert [(item.step, item.value) for item in history] == [
            (step, 1 / (step + 1)) for step in range(count)
        ]
    assert {name: found.data.metrics[name] for name in FINAL} == FINAL

    [file] = folder.glob("wandb/offline-run-*/*.wandb")
    logged: list[dict[str, Any]] = []
    for record in wandb_records(file):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            logged.append(
                {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
            )
    for stage, count in losses.items():
        told = [(row[f"{stage}/step"], row[f"{stage}/loss"]) for row in logged if f"{stage}/loss" in row]
        assert told == [(step, pytest.approx(1 / (step + 1))) for step in range(count)]
    assert {name: value for row in logged for name, value in row.items() if name in FINAL} == FINAL


def test_trackers_are_told_of_a_failed_run(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    def broken() -> None:
        with track.opened(load("smoke", [f"track.mlflow.uri={tmp_path}"]), tmp_path, print) as trackers:
            trackers.steps("warmup", rows(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    client = MlflowClient(tracking_uri=str(tmp_path))
    [found] = client.search_runs([str(client.get_experiment_by_name("allo_ray").experiment_id)])
    assert found.info.status == "FAILED"


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    warned: list[str] = []
    config = load("smoke", [f"track.mlflow.uri={tmp_path}/ml", "track.tensorboard={}"])
    with track.opened(config, tmp_path, warned.append) as trackers:
        trackers.steps(
            "warmup", [{"step": 0, "loss": 0.5, "a//name": 1.0}]
        )  # a name that MLflow takes for a folder
        trackers.steps("warmup", [{"step": 1, "loss": 0.25}])
    assert [line.partition(":")[0] for line in warned] == ["track.mlflow"]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("warmup/loss")] == [0.5, 0.25]


def test_a_missing_package_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    for name in ("tensorboard", "mlflow", "wandb"):
        with pytest.raises(UserError, match=rf"track\.{name}: the package .* is missing"):
            track.check(load("smoke", [f"track.{name}={{}}"]).track)


def test_a_missing_key_or_address_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "MLFLOW_TRACKING_URI", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    online = load("smoke", ["track.wandb={}"]).track
    with pytest.raises(UserError, match=r"WANDB_API_KEY, or choose track\.wandb\.mode: offline"):
        track.check(online)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    track.check(online)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        track.check(load("smoke", ["track.mlflow={}"]).track)
    track.check(load("smoke").track)


def test_no_password_gets_into_a_config() -> None:
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD"):
        load("smoke", ["track.mlflow.uri=https://me:secret@ml.example.org"])


def test_trackers_decide_no_key_and_cost_no_import() -> None:
    import subprocess
    import sys

    code = "import sys, allo_ray.track; print(*({'mlflow', 'wandb', 'tensorboardX'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == ""
