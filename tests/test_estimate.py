"""Engines that fit no memory are refused before they start."""

from __future__ import annotations

from pathlib import Path

import pytest

from allo_ray import align, estimate
from allo_ray.config.engine import EngineConfig, EngineResources
from allo_ray.config.load import load
from allo_ray.errors import UserError
from allo_ray.estimate import GIB, PROCESS_BYTES, check_engine, engine_bytes
from allo_ray.store import Store


def test_weights_cache_and_program_are_counted() -> None:
    pool = EngineResources(kv_cache_gib=2)
    half = EngineConfig(dtype="bfloat16", pool=pool)
    assert engine_bytes(half, 7 * 10**9) == 14 * 10**9 + 2 * GIB + PROCESS_BYTES
    full = EngineConfig(kind="transformers", dtype="float32", pool=pool)
    assert engine_bytes(full, 10**9) == 4 * 10**9 + PROCESS_BYTES


def test_a_model_that_fits_no_memory_is_refused() -> None:
    """A thousand billion values; a small one passes, and on a cluster its nodes decide."""
    engine = EngineConfig(dtype="bfloat16")
    with pytest.raises(
        UserError, match=r"^reward\.model: the weights take 1862\.6 GiB in bfloat16 and its cache 1"
    ):
        check_engine(engine, 10**12, "reward.model", None)
    check_engine(engine, 1000, "reward.model", None)
    check_engine(engine, 10**12, "reward.model", "ray://head:10001")


def test_a_run_is_refused_before_it_starts(tiny_llama: Path, tmp_path: Path) -> None:
    """`allo align` counts the reward model too, and an engine without room ends it at once."""
    settings = [f"model.path={tiny_llama}", f"reward.model={tiny_llama}", f"store={tmp_path}"]
    config = load("smoke", settings)
    assert estimate.other_models(config) == {"reward.model": estimate.neurons_of(config.model)}
    pool = config.engine.pool.model_copy(update={"kv_cache_gib": 1e6})
    large = config.model_copy(update={"engine": config.engine.model_copy(update={"pool": pool})})
    with pytest.raises(UserError, match=r"model\.path: the weights take .* its cache 1e\+06 GiB"):
        align.check(large, Store(str(tmp_path)))
