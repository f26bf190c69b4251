"""Makes the engine that a config asks for."""

from __future__ import annotations

import sys
from pathlib import Path

from allo_ray.config.engine import EngineConfig
from allo_ray.engines.base import Engine
from allo_ray.errors import UserError


def build_engine(config: EngineConfig, model: str) -> Engine:
    """Starts an engine on the model folder `model`.

    Raises:
        UserError: vLLM is asked for and not installed.
    """
    if config.kind == "transformers":
        from allo_ray.engines.transformers_engine import TransformersEngine

        return TransformersEngine(config, model)
    from allo_ray.engines.vllm_engine import VllmEngine

    try:
        return VllmEngine(config, model)
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise UserError(
            "engine.kind: vllm, but vLLM is not installed. Install the extra cpu or gpu, "
            "or set engine.kind: transformers."
        ) from None


def engine_environment(config: EngineConfig) -> dict[str, str]:
    """Environment variables of a process in which an engine runs; they must be there when it starts."""
    from allo_ray.engines.vllm_engine import vllm_environment

    told = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if config.pool.num_gpus == 0:
        # As many OpenMP threads as the actor owns: two programs that each take every core slow each other tenfold.
        told["OMP_NUM_THREADS"] = str(config.pool.threads or max(1, int(config.pool.num_cpus)))
        intel = Path(sys.prefix) / "lib" / "libiomp5.so"
        if config.kind == "vllm" and intel.exists():
            told["LD_PRELOAD"] = str(intel)
    return told | (vllm_environment(config) if config.kind == "vllm" else {})
