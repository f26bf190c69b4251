"""Which models the neurons' tests run on."""

from __future__ import annotations

import pytest

from tests.neurons.reference import KINDS


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    """llama: tied embeddings; qwen: untied, biases in q, k, v; neox: untied, biases and LayerNorm."""
    return request.param
