"""Trainers and samplers ask Ray for what only their own group of nodes offers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.data
import ray.train.torch

from allo_ray import tables
from allo_ray.capacity import needs, room
from allo_ray.config.engine import EngineConfig, EngineResources
from allo_ray.config.load import load
from allo_ray.config.train import TrainConfig, TrainerConfig
from allo_ray.data import inference
from allo_ray.errors import UserError
from allo_ray.nodes import growth
from allo_ray.train import fit
from allo_ray.train.job import TrainJob
from allo_ray.train.logprobs import compute_logprobs
from tests.cluster.test_kuberay import rendered

TRAINER = TrainerConfig(workers=2, resources={"trainer": 1}, placement="spread")
SAMPLER = EngineConfig(pool=EngineResources(actors=2, resources={"sampler": 0.5}))


class AskedError(Exception):
    """Instead of what would run."""


class Asked:
    """Stands for the dataset, and for the trainer: notes what the real one would be made with. No Ray is started."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.context = SimpleNamespace(execution_options=SimpleNamespace())

    def repartition(self, **_: Any) -> Asked:
        return self

    def map_batches(self, *_: object, **options: Any) -> None:
        self.options = options
        raise AskedError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    told = Asked()
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", told.map_batches)
    monkeypatch.setattr(ray.data, "read_parquet", lambda *_, **__: told)
    monkeypatch.setattr(fit, "read", lambda *_: told)
    return told


def test_trainers_and_samplers_ask_for_their_groups(asked: Asked, tmp_path: Path) -> None:
    """The workers of Ray Train, the actors that compute log-probs, and the engines."""
    config = TrainConfig(lr=1e-3)
    rows, pairs = tmp_path / "rows.parquet", tmp_path / "pairs.parquet"
    tables.TRAIN_ROWS.write([], rows)
    tables.PAIRS.write([], pairs)
    job = TrainJob("base", (), None, str(rows), "dpo", config, TRAINER, str(tmp_path))
    with pytest.raises(AskedError):
        fit.fit_all([(job, 1)])
    scaling = asked.options["scaling_config"]
    assert scaling.resources_per_worker == {"CPU": 1, "trainer": 1}
    assert scaling.placement_strategy == "SPREAD"
    with pytest.raises(AskedError):
        compute_logprobs("base", (), pairs, tmp_path / "out", "float32", TRAINER)
    assert asked.options["resources"] == {"trainer": 1}
    stream: Any = asked
    assignments: Any = [SimpleNamespace(work=SimpleNamespace(requests=1))]
    with pytest.raises(AskedError):
        next(inference._stream(stream, SAMPLER, assignments))
    assert asked.options["resources"] == {"sampler": 0.5}


def test_groups_count_as_room_and_rayjob_asks_for_them(tmp_path: Path) -> None:
    """8 trainers and 16 samplers of a GPU each: 24 GPUs hold three runs of 8, the group of trainers one."""
    (cluster,), (job,) = rendered("raycluster.yaml"), rendered("rayjob.yaml")
    [head] = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    nodes = growth((), {one["name"]: one["value"] for one in head["env"]}["ALLO_RAY_NODES"])
    words = job["spec"]["entrypoint"].split()
    settings = [value for word, value in zip(words, words[1:], strict=False) if word == "--set"]
    config = load("qa", settings)
    assert (config.trainer.resources, config.engine.pool.resources) == ({"trainer": 1}, {"sampler": 1})
    assert room(needs(load("qa")), nodes) == 3
    assert room(needs(config), nodes) == 1


@pytest.mark.parametrize(
    "told", ["trainer.resources.GPU=1", "engine.pool.resources={memory: 1}", "trainer.resources.x=0"]
)
def test_rays_own_resources_and_nothing_are_refused(told: str) -> None:
    with pytest.raises(UserError, match=r"(trainer|engine\.pool)\.resources"):
        load("qa", [told])
