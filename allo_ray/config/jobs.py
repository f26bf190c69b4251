"""Configs of the jobs that do one part of the method alone."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from allo_ray.config.base import Section
from allo_ray.config.data import DataConfig, SuiteConfig, VerifyConfig
from allo_ray.config.engine import EngineConfig, JudgeConfig, SampleConfig, SamplingConfig
from allo_ray.config.model import ModelConfig
from allo_ray.config.run import ClusterConfig


class SampleJob(Section):
    """`allo sample`: n responses to every prompt."""

    #: Folder or URL of the samples; running again goes on where it was.
    out: str
    seed: int = 17
    model: ModelConfig
    data: DataConfig
    engine: EngineConfig = EngineConfig()
    sample: SampleConfig = SampleConfig()
    #: Null: samples are not judged.
    verify: VerifyConfig | None = None
    cluster: ClusterConfig = ClusterConfig()


class ScoreColumns(Section):
    """Names of the columns of rows to score. The response's text, or token ids of both under `<name>_ids`."""

    id: str | None = None
    context: str = "context"
    response: str = "response"


class ScoreJob(Section):
    """`allo score`: the probability or log-prob of every token of given responses."""

    out: str
    model: ModelConfig
    #: JSONL or Parquet: files, a folder or a pattern on any file system.
    rows: str
    columns: ScoreColumns = ScoreColumns()
    #: Model whose tokens the scores are for (its tokenizer); the scoring model itself by default. Ids in the rows are
    #: then its own, and the scores of its tokens are written to `token_scores.parquet`.
    policy: ModelConfig | None = None
    logprobs: bool = False
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _policy_takes_probabilities(self) -> ScoreJob:
        if self.policy is not None and self.logprobs:
            raise ValueError("policy carries probabilities over to other tokens: set logprobs: false")
        return self


class EvalJob(Section):
    """`allo eval`: suites answered and scored with any models of one architecture."""

    #: A folder; on a cluster one that all nodes mount.
    out: str
    #: Label -> model.
    models: dict[str, ModelConfig] = Field(min_length=1)
    suites: tuple[SuiteConfig, ...] = Field(min_length=1)
    template: str = "plain"
    sampling: SamplingConfig = SamplingConfig(temperature=0, top_p=1.0, max_tokens=512)
    verify: VerifyConfig = VerifyConfig()
    judge: JudgeConfig | None = None
    engine: EngineConfig = EngineConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("out")
    @classmethod
    def _out_is_a_folder(cls, out: str) -> str:
        if "://" in out:
            raise ValueError(
                "scores are written to a folder: give a path, on a cluster one that all nodes mount"
            )
        return out
