"""Where a run's metrics are sent beside its own report."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from allo_ray.config.base import Section


class TensorBoardConfig(Section):
    """Event files that `tensorboard --logdir` shows."""

    #: By default runs/<name>/tensorboard.
    folder: str | None = None


class MlflowConfig(Section):
    """An MLflow server, or a folder."""

    #: By default what MLFLOW_TRACKING_URI says. User and password belong into MLFLOW_TRACKING_USERNAME and
    #: MLFLOW_TRACKING_PASSWORD.
    uri: str | None = None
    experiment: str = Field(default="allo_ray", min_length=1)

    @field_validator("uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        if uri is not None and urlsplit(uri).password is not None:
            raise ValueError(
                "configs are stored with every run, so no password may stand in one: set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD"
            )
        return uri


class WandbConfig(Section):
    """Weights & Biases. Its key stays where `wandb login` or WANDB_API_KEY has it."""

    project: str = Field(default="allo_ray", min_length=1)
    entity: str | None = None
    #: "offline" writes to runs/<name>/wandb, for a later `wandb sync`.
    mode: Literal["online", "offline"] = "online"


class TrackConfig(Section):
    """Trackers that are told the config, every step of every trained stage, and the final scores."""

    runtime = True

    tensorboard: TensorBoardConfig | None = None
    mlflow: MlflowConfig | None = None
    wandb: WandbConfig | None = None
