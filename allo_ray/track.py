"""Trackers of a run: TensorBoard, MLflow, Weights & Biases, each imported only where the config asks for it.

Steps arrive while a stage trains, and again from its finished table; each is logged once, in its order. A tracker
that fails says so and is left out from then on: a run never ends for one.
"""

from __future__ import annotations

import json
import netrc
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from allo_ray.config.run import RunConfig
from allo_ray.config.track import MlflowConfig, TensorBoardConfig, TrackConfig, WandbConfig
from allo_ray.errors import UserError

Row = Mapping[str, Any]


class Tracker(Protocol):
    """One backend. Every call comes under the lock of `Trackers`."""

    def step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Metrics of one optimiser step of a stage, by name."""
        ...

    def results(self, values: Mapping[str, float]) -> None:
        """Scores at the end of the run, by name."""
        ...

    def close(self, failed: bool) -> None: ...


class Trackers:
    """All backends of a run. Methods may be called from any thread."""

    def __init__(self, backends: Mapping[str, Tracker], warn: Callable[[str], object]) -> None:
        self._backends = dict(backends)
        self._warn = warn
        self._lock = threading.Lock()
        self._next: dict[str, int] = {}

    def steps(self, stage: str, rows: Iterable[Row]) -> None:
        """Rows of METRICS; those that were logged already are passed over."""
        with self._lock:
            for row in rows if self._backends else ():
                if row["step"] < self._next.get(stage, 0):
                    continue
                self._next[stage] = row["step"] + 1
                values = {name: value for name, value in row.items() if name != "step" and value is not None}
                self._each(lambda one, row=row, values=values: one.step(_plain(stage), row["step"], values))

    def results(self, summary: Mapping[str, Any]) -> None:
        """The accuracies of summary.json, and each model's KL divergence from the SFT model."""
        values = {"final/wall_seconds": summary["wall_seconds"]}
        for label, told in summary["models"].items():
            for suite, scores in told.items():
                value = scores.get("accuracy", scores.get("mean"))
                if value is not None:
                    values[_plain(f"final/{suite}/{label}")] = value
        with self._lock:
            self._each(lambda one: one.results(values))

    def close(self, failed: bool) -> None:
        with self._lock:
            self._each(lambda one: one.close(failed))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, backend in list(self._backends.items()):
            try:
                call(backend)
            except Exception as error:  # each backend and its transport raise their own
                del self._backends[name]
                self._warn(
                    f"track.{name}: left out from here on ({type(error).__name__}: {_first_line(error)})"
                )


def check(config: TrackConfig) -> None:
    """What can be found wrong before anything starts: a library or a key that is not there.

    Raises:
        UserError: one of them is missing; says how to get it.
    """
    for name, module, package, section in (
        ("tensorboard", "tensorboardX", "tensorboardX", config.tensorboard),
        ("mlflow", "mlflow", "mlflow-skinny", config.mlflow),
        ("wandb", "wandb", "wandb", config.wandb),
    ):
        if section is not None and find_spec(module) is None:
            raise UserError(
                f"track.{name}: the package {package} is missing. Run: pip install {package} (or install the extra "
                f"`track`), or leave track.{name} out."
            )
    if config.mlflow is not None and config.mlflow.uri is None and "MLFLOW_TRACKING_URI" not in os.environ:
        raise UserError("track.mlflow: give the server's uri, or set MLFLOW_TRACKING_URI")
    if config.wandb is not None and config.wandb.mode == "online" and not _wandb_key():
        raise UserError(
            "track.wandb: no key of Weights & Biases here. Run `wandb login`, set WANDB_API_KEY, or choose "
            "track.wandb.mode: offline."
        )


def of_trial(config: RunConfig, campaign: str, number: int) -> RunConfig:
    """The run of a trial as trackers are to know it: named by campaign and number, with event files of its own."""
    name = f"{campaign}-{number:04d}"
    board = config.track.tensorboard
    if board is not None and board.folder is not None:
        board = board.model_copy(update={"folder": f"{board.folder.rstrip('/')}/{name}"})
    track = config.track.model_copy(update={"tensorboard": board})
    return config.model_copy(update={"name": name, "track": track})


@contextmanager
def opened(config: RunConfig, folder: Path, warn: Callable[[str], object]) -> Iterator[Trackers]:
    """The trackers that `config.track` asks for; `folder` is the run's. Tells them whether the block failed.

    Raises:
        UserError: a tracker cannot be reached or does not accept the run.
    """
    told, wanted = config.model_dump(mode="json"), config.track
    makers: dict[str, Callable[[], Tracker]] = {}
    if wanted.tensorboard is not None:
        makers["tensorboard"] = lambda section=wanted.tensorboard: _TensorBoard(section, folder, told)
    if wanted.mlflow is not None:
        makers["mlflow"] = lambda section=wanted.mlflow: _Mlflow(section, config.name, told)
    if wanted.wandb is not None:
        makers["wandb"] = lambda section=wanted.wandb: _Wandb(section, config.name, folder, told)
    if makers:
        folder.mkdir(parents=True, exist_ok=True)
    backends: dict[str, Tracker] = {}
    for name, make in makers.items():
        try:
            backends[name] = make()
        except Exception as error:  # each backend and its transport raise their own
            raise UserError(f"track.{name}: {type(error).__name__}: {_first_line(error)}") from None
    trackers = Trackers(backends, warn)
    try:
        yield trackers
    except SystemExit:  # a scheduler has ended a trial
        trackers.close(failed=False)
        raise
    except BaseException:
        trackers.close(failed=True)
        raise
    trackers.close(failed=False)


class _TensorBoard:
    def __init__(self, config: TensorBoardConfig, folder: Path, told: Mapping[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(config.folder or str(folder / "tensorboard"), flush_secs=10)
        self._writer.add_text("config", f"```json\n{json.dumps(told, indent=1)}\n```")

    def step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)

    def results(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, 0)

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Mlflow:
    def __init__(self, config: MlflowConfig, name: str, told: Mapping[str, Any]) -> None:
        if config.uri is not None and urlsplit(config.uri).scheme in ("", "file"):
            os.environ.setdefault(
                "MLFLOW_ALLOW_FILE_STORE", "true"
            )  # else MLflow 3 refuses the folder asked for
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(tracking_uri=config.uri), Metric
        experiment = self._client.get_experiment_by_name(config.experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(config.experiment)
        self._run = self._client.create_run(number, run_name=name).info.run_id
        params = [Param(key, str(value)[:5000]) for key, value in _flat(told)]
        for start in range(0, len(params), 100):
            self._client.log_batch(self._run, params=params[start : start + 100])

    def step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._log({f"{stage}/{name}": value for name, value in values.items()}, step)

    def results(self, values: Mapping[str, float]) -> None:
        self._log(values, 0)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")

    def _log(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._run, [self._metric(name, value, now, step) for name, value in values.items()]
        )


class _Wandb:
    def __init__(self, config: WandbConfig, name: str, folder: Path, told: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=name,
            config=told,
            dir=str(folder),
            mode=config.mode,
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
        self._stages: set[str] = set()

    def step(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self._stages:
            # Stages run side by side, each with steps of its own.
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}})

    def results(self, values: Mapping[str, float]) -> None:
        self._run.log(dict(values))

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _wandb_key() -> bool:
    """Whether there is a key, wherever W&B looks for one; nothing is read of it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _flat(values: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """section.key and value of every leaf that is set."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{at}{key}.")
        elif value is not None:
            yield _plain(f"{at}{key}"), value


def _plain(name: str) -> str:
    """A name that every backend takes."""
    return re.sub(r"[^\w./-]", "_", name)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
