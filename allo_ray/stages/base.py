"""What a stage is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from allo_ray.config.run import RunConfig
from allo_ray.models import ModelRef
from allo_ray.store import Artifact, Store, local_path

if TYPE_CHECKING:
    from allo_ray.config.engine import EngineConfig
    from allo_ray.spent import Spent
    from allo_ray.stages.answers import Asked
    from allo_ray.train.job import TrainJob


class Progress(Protocol):
    """A live line of a stage."""

    def update(self, done: int, total: int, unit: str, **facts: Any) -> None:
        """`done` of `total` units are finished; `facts` are shown beside (loss, tokens/s)."""
        ...


class Desk(Protocol):
    """Has small work of several runs done together, by engines and trainers that start once for all of it; what is
    large the run does itself.

    Raises:
        UserError: as what does the work.
    """

    def answer(self, asked: Asked, engine: EngineConfig, store: Store, progress: Progress) -> Spent:
        """In the place of `stages.answers.answer`."""
        ...

    def fit(self, job: TrainJob, steps: int) -> Spent:
        """In the place of `train.driver.alone`."""
        ...

    def away(self) -> AbstractContextManager[None]:
        """Around a time in which the run waits for what another one makes, and so brings no work."""
        ...


@dataclass
class Context:
    """A stage's inputs and the folder it writes to. Facts end up in the artifact and in summary.json."""

    config: RunConfig
    settings: Mapping[str, Any]
    inputs: Mapping[str, Artifact]
    out: Path
    key: str
    store: Store
    progress: Progress
    #: Takes rows of METRICS as a trained stage makes them.
    record: Callable[[Iterable[Mapping[str, Any]]], None] = lambda rows: None
    #: None: the stage starts engines and trainers of its own.
    desk: Desk | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    #: Seconds before the first row or batch of real work began.
    startup_seconds: float = 0.0
    #: Seconds in which the stage did nothing but wait for others' work; they are not told as its own.
    waited_seconds: float = 0.0

    def file(self, role: str, name: str) -> Path:
        """A file of an input, on this machine."""
        return local_path(self.inputs[role].file(name))

    def model(self, role: str) -> ModelRef:
        """The model that an input holds or was made with."""
        return artifact_model(self.inputs[role], self.store)

    def hand_on(self, base: str, masters: str | None, deltas: tuple[str, ...]) -> None:
        """Says which model this artifact holds. Paths inside the store are kept relative to it."""
        self.facts["model"] = {
            "base": self._relative(base),
            "masters": self._relative(masters) if masters else None,
            "deltas": [self._relative(path) for path in deltas],
        }

    def dropped(self, counts: Mapping[str, int], reasons: Mapping[str, str]) -> None:
        """Notes how many rows each rule removed, for summary and report. reasons: name in `counts` -> what to say."""
        self.facts["drops"] = {text: counts[name] for name, text in reasons.items() if counts.get(name)}

    def published(self, stage: Stage, name: str) -> str:
        """The path a file of this stage's work folder will have once it is published."""
        return f"{self.store.root}/{stage.name}/{self.key}/{name}"

    def _relative(self, path: str) -> str:
        return (
            path.replace(f"{self.store.root}/", "store:", 1)
            if path.startswith(f"{self.store.root}/")
            else path
        )


def artifact_model(artifact: Artifact, store: Store) -> ModelRef:
    """The model that an artifact holds, with paths as they are here."""

    def absolute(path: str) -> str:
        return path.replace("store:", f"{store.root}/", 1) if path.startswith("store:") else path

    told = artifact.facts["model"]
    masters = absolute(told["masters"]) if told["masters"] else None
    return ModelRef(absolute(told["base"]), masters, tuple(map(absolute, told["deltas"])))


def data_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a data section, without the hash of its content that the key needs."""
    return {key: value for key, value in settings["data"].items() if key != "content"}


@dataclass(frozen=True)
class Stage:
    """A step of the method. `version` goes up whenever its code gives another result for the same inputs."""

    name: str
    version: int
    run: Callable[[Context], None]
