"""The whole config of a run."""

from __future__ import annotations

from pydantic import Field, field_validator, model_validator

from allo_ray.config.base import Bytes, Offered, Section
from allo_ray.config.data import DataConfig, PairConfig, SuiteConfig, VerifyConfig
from allo_ray.config.engine import EngineConfig, JudgeConfig, SampleConfig, SamplingConfig, TeacherConfig
from allo_ray.config.model import ModelConfig
from allo_ray.config.track import TrackConfig
from allo_ray.config.train import (
    BaselineConfig,
    ForgetConfig,
    LearnConfig,
    LocateConfig,
    RewardConfig,
    SftConfig,
    TrainerConfig,
    WarmupConfig,
)


class EvaluateConfig(Section):
    """What the models are asked at the end; greedy unless said otherwise."""

    suites: tuple[SuiteConfig, ...] = ()
    sampling: SamplingConfig = SamplingConfig(temperature=0, top_p=1.0, max_tokens=512)
    #: Needed by suites whose answers a judge compares (AlpacaEval, Arena-Hard).
    judge: JudgeConfig | None = None
    #: Samples of the SFT model on which every model's KL divergence from it is estimated; 0: not at all.
    kl_samples: int = Field(default=256, ge=0)

    @model_validator(mode="after")
    def _titles(self) -> EvaluateConfig:
        if any(suite.title == "kl" for suite in self.suites):
            raise ValueError("no suite may be called kl: results tell the KL divergence under that name")
        return self


class NodeType(Section):
    """A kind of node of a cluster that grows by itself, and what one such node offers."""

    #: Nodes of this kind at most.
    count: int = Field(ge=0)
    num_cpus: float = Field(ge=0)
    num_gpus: float = Field(default=0, ge=0)
    #: Bytes, or a text such as 96Gi; where it is not told, as much as anything needs.
    memory: Bytes | None = None
    #: What it offers beside these, such as {trainer: 1}.
    resources: Offered = Field(default_factory=dict)


class ClusterConfig(Section):
    """The Ray cluster: an address, or a cluster of this machine's own."""

    runtime = True

    #: "auto" or an address joins a running cluster; null starts a local one (inside a Ray job: joins its cluster).
    address: str | None = None
    #: Logical CPUs of a local cluster; by default the real ones and four for the tasks that feed them.
    num_cpus: int | None = Field(default=None, ge=1)
    #: What a cluster that grows by itself may grow to, beside its head. By default what ALLO_RAY_NODES says where the
    #: driver runs (the files in cluster/ set it), else the nodes that live now.
    nodes: tuple[NodeType, ...] = ()
    #: Stages that do not need each other run side by side, up to this many.
    parallel_stages: int = Field(default=2, ge=1)


class RunConfig(Section):
    """One alignment run. Sections that are null are stages left out."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = 17
    #: Artifacts of finished stages: a folder or a URL that every node reaches.
    store: str = "store"
    #: Results are written to <runs>/<name>: a folder, no URL.
    runs: str = "runs"
    model: ModelConfig
    data: DataConfig
    sft: SftConfig | None = None
    engine: EngineConfig = EngineConfig()
    sample: SampleConfig | None = SampleConfig()
    verify: VerifyConfig = VerifyConfig()
    pair: PairConfig = PairConfig()
    warmup: WarmupConfig
    locate: LocateConfig = LocateConfig()
    rewrite: TeacherConfig | None = None
    reward: RewardConfig | None = None
    forget: ForgetConfig | None = None
    learn: LearnConfig | None = None
    baselines: dict[str, BaselineConfig] = Field(default_factory=dict)
    evaluate: EvaluateConfig = EvaluateConfig()
    trainer: TrainerConfig = TrainerConfig()
    cluster: ClusterConfig = ClusterConfig()
    track: TrackConfig = TrackConfig()

    @field_validator("runs")
    @classmethod
    def _folder(cls, runs: str) -> str:
        if "://" in runs:
            raise ValueError("results are written to a folder; a URL may stand in `store` alone")
        return runs

    @model_validator(mode="after")
    def _dtype_on_gpus(self) -> RunConfig:
        stages = (self.sft, self.warmup, self.reward, self.forget, self.learn, *self.baselines.values())
        for stage in stages if self.trainer.num_gpus else ():
            if stage is not None and "dtype" not in stage.model_fields_set:
                object.__setattr__(stage, "dtype", "bfloat16")
        return self

    @model_validator(mode="after")
    def _stages_fit(self) -> RunConfig:
        if self.data.kind == "prompts" and self.sample is None:
            raise ValueError(
                "data.kind: prompts needs the section `sample` (responses have to come from somewhere)"
            )
        if self.sft is not None and self.sft.data is None and self.data.kind == "pairs":
            raise ValueError("sft.data is needed where data.kind is pairs")
        if self.forget is None and self.learn is None:
            raise ValueError("nothing to train: give the section `forget`, the section `learn`, or both")
        if self.forget is not None and self.forget.weight != "none" and None in (self.rewrite, self.reward):
            raise ValueError(
                "forget.weight needs token scores: give the sections `rewrite` and `reward`, or set forget.weight: none"
            )
        scored = [name for name, baseline in self.baselines.items() if baseline.needs_scores]
        if scored and None in (self.rewrite, self.reward):
            raise ValueError(
                f"baselines.{scored[0]} needs token scores: give the sections `rewrite` and `reward`, or take loss: ppo"
            )
        if self.locate.order == "band" and self.locate.band is not None:
            width = self.locate.band[1] - self.locate.band[0]
            for stage in (self.forget, self.learn):
                if stage is not None and abs(stage.k - width) > 1e-9:
                    raise ValueError(
                        f"locate.band is {width:g} wide, so k must be {width:g} too (found {stage.k:g})"
                    )
        return self
