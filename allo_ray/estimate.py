"""What a run will take of memory and disk, by arithmetic, before anything starts.

N neurons, of which K are trained. Training holds 2 or 4 bytes of weight a neuron, and for each trained one its
float32 value, gradient and two moments, and its int32 index where not all are trained.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from allo_ray.config.base import bounds
from allo_ray.config.engine import EngineConfig
from allo_ray.config.model import ModelConfig
from allo_ray.config.run import RunConfig
from allo_ray.config.train import TrainConfig
from allo_ray.doctor import gpu_bytes, memory
from allo_ray.errors import UserError
from allo_ray.models import neurons_of
from allo_ray.store import Store

GIB = 1 << 30
#: Interpreter, torch, Ray and DeepSpeed in one worker; measured 1.0 to 1.3 GiB on the CPU.
PROCESS_BYTES = 5 * GIB // 4
#: Activations kept for the backward pass, a token of SmolLM2-135M's size; measured, scaled with the root of N.
ACTIVATION_BYTES = 500_000
MEASURED_NEURONS = 134_515_008


@dataclass(frozen=True)
class Estimate:
    """Bytes of one training worker by stage, bytes of the largest engine, bytes of disk in the store and the run."""

    training: dict[str, int]
    engine: int
    disk: int


def estimate(config: RunConfig, neurons: int) -> Estimate:
    """Returns what the stages of `config` take for a model of `neurons` values.

    Raises:
        UserError: the config names another model, which is not there.
    """
    others = other_models(config)

    def worker(train: TrainConfig, k: float, neurons: int = neurons) -> int:
        weight = 2 if train.dtype == "bfloat16" else 4
        if k == 1 and train.dtype == "float32":
            weight = 0  # a dense float32 weight shares its storage with the value
        states = k * (16 + (4 if k < 1 else 0))
        if config.trainer.zero_stage >= 1:
            states = k * (8 + (4 if k < 1 else 0) + 8 / bounds(config.trainer.workers)[0])
        scale = (neurons / MEASURED_NEURONS) ** 0.5
        activations = config.trainer.micro_batch_tokens * ACTIVATION_BYTES * scale
        if config.trainer.checkpointing:
            activations /= 10
        return int(neurons * (weight + states) + activations) + PROCESS_BYTES

    training = {"warmup": worker(config.warmup, 1.0)}
    disk = 2 * neurons + 4 * neurons + 8 * neurons  # aligned model, warm-up masters, ranked importances
    if config.sft is not None:
        training["sft"] = worker(config.sft, 1.0)
        disk += 6 * neurons
    if config.reward is not None and config.forget is not None:
        scorer = others.get("reward.model", neurons)
        training["reward"] = worker(config.reward, 1.0, scorer)
        disk += 6 * scorer
    if config.forget is not None:
        training["forget"] = worker(config.forget, config.forget.k)
        disk += int(8 * config.forget.k * neurons)
    if config.learn is not None:
        training["learn"] = worker(config.learn, config.learn.k)
        disk += int(8 * config.learn.k * neurons)
    for name, baseline in config.baselines.items():
        training[f"baseline {name}"] = worker(baseline, baseline.k)
        disk += int((4 if baseline.k == 1 else 8 * baseline.k) * neurons)
    disk += 2 * neurons  # the model under evaluation, while it is
    return Estimate(training, engine_bytes(config.engine, max(neurons, *others.values(), 0)), disk)


def other_models(config: RunConfig) -> dict[str, int]:
    """Neurons of the models that engines run beside the backbone, by the setting that names each.

    Raises:
        UserError: one of them is not there.
    """
    told = {
        "reward.model": config.reward.model if config.reward is not None else None,
        "rewrite.model": config.rewrite.model
        if config.rewrite is not None and config.rewrite.kind == "model"
        else None,
    }
    return {key: neurons_of(ModelConfig(path=path)) for key, path in told.items() if path is not None}


def engine_bytes(engine: EngineConfig, neurons: int) -> int:
    """Memory of one engine on the CPU for a model of `neurons` values."""
    cache = int(engine.pool.kv_cache_gib * GIB) if engine.kind == "vllm" else 0
    return _weight_bytes(engine, neurons) + cache + PROCESS_BYTES


def _weight_bytes(engine: EngineConfig, neurons: int) -> int:
    return neurons * (2 if engine.dtype == "bfloat16" else 4)


def check_engine(engine: EngineConfig, neurons: int, key: str, address: str | None) -> None:
    """Compares the engines of a model with this machine; on a cluster, whose nodes may come later, does nothing.

    `key` is the setting that names the model, `address` the setting cluster.address.

    Raises:
        UserError: they do not fit; says by how much, and what to change.
    """
    if address or os.environ.get("RAY_ADDRESS"):
        return
    pool = engine.pool
    weights = _weight_bytes(engine, neurons)
    named = f"{key}: the weights take {weights / GIB:.1f} GiB in {engine.dtype}"
    if pool.num_gpus:
        room = gpu_bytes()
        if room is not None and weights / pool.tensor_parallel > pool.gpu_memory_utilization * room:
            raise UserError(
                f"{named}; a GPU here has {room / GIB:.1f} GiB, of which engine.pool.gpu_memory_utilization = "
                f"{pool.gpu_memory_utilization:g} may be used. Raise engine.pool.tensor_parallel (now "
                f"{pool.tensor_parallel}), take a smaller model, or join a cluster with larger GPUs (cluster.address)."
            )
        return
    actors = bounds(pool.actors)[0]
    each = engine_bytes(engine, neurons)
    available = memory()[1]
    if actors * each > available:
        cache = f" and its cache {pool.kv_cache_gib:g} GiB" if engine.kind == "vllm" else ""
        raise UserError(
            f"{named}{cache}: with the program itself {each / GIB:.1f} GiB for each of {actors} engine(s), "
            f"{available / GIB:.1f} GiB are available. Lower engine.pool.actors or engine.pool.kv_cache_gib, take a "
            "smaller model, or join a cluster with larger machines (cluster.address)."
        )


def check(config: RunConfig, needed: Estimate, store: Store) -> None:
    """Compares an estimate with this machine, where the run stays on it and on the CPU.

    Raises:
        UserError: memory or disk does not suffice; says by how much, and what to change.
    """
    free = store.free_bytes()
    if free is not None and needed.disk > free:
        raise UserError(
            f"store {store.root}: about {needed.disk / GIB:.1f} GiB will be written, {free / GIB:.1f} GiB are free. "
            "Free some, or give another folder with --set store=..."
        )
    if config.cluster.address is not None or config.trainer.num_gpus or config.engine.pool.num_gpus:
        return
    workers = bounds(config.trainer.workers)[0]
    largest = sorted(needed.training, key=lambda stage: needed.training[stage])[
        -config.cluster.parallel_stages :
    ]
    most = workers * sum(needed.training[stage] for stage in largest)
    available = memory()[1]
    if most > available:
        raise UserError(
            f"{' and '.join(largest)} need about {most / GIB:.1f} GiB of memory ({workers} worker(s) each), "
            f"{available / GIB:.1f} GiB are available. Lower trainer.workers, trainer.micro_batch_tokens or "
            "cluster.parallel_stages, set trainer.gradient_checkpointing=true, or take a smaller model."
        )
