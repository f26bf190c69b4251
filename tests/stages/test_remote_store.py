"""Stages over a store behind a URL: engines and trainers open what they need by paths on the machine."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from allo_ray import method, pipeline, tables
from allo_ray.config.load import load
from allo_ray.report.terminal import Progress
from allo_ray.stages.base import artifact_model
from allo_ray.store import Store, local_path

NEEDED = ("model", "prompts", "sft prompts", "sft", "sample")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_model_is_trained_and_sampled_from_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 prompts, two samples each, by a model that was trained from one behind a URL and lies behind one itself."""
    monkeypatch.setenv("ALLO_RAY_CACHE", str(tmp_path))
    url = f"memory://{tmp_path.name}"
    config = load("smoke", [f"store={url}", "engine.kind=transformers", "sample.max_tokens=4"])
    nodes = [node for node in method.graph(config) if node.name in NEEDED]
    store = Store(url)
    done = pipeline.run(config, nodes, store, Progress(Console(file=io.StringIO())))
    assert artifact_model(done["sft"].artifact, store).base.startswith(f"{url}/sft/")
    samples = tables.SAMPLES.read(local_path(done["sample"].artifact.file("samples")))
    assert len(samples) == 48
