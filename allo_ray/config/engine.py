"""How responses are sampled and scored."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from allo_ray.config.base import Count, Dtype, PositiveFraction, Resources, Section, cpu_dtype


class EngineResources(Section):
    """Where engines run and how much they take; changes no result."""

    runtime = True

    #: Actors, or (fewest, most) for a pool that follows the cluster.
    actors: Count = 1
    num_cpus: float = Field(default=1, gt=0)
    num_gpus: float = Field(default=0, ge=0)
    #: What an actor takes beside these: {sampler: 1} keeps it to nodes that offer it (cluster/kuberay).
    resources: Resources = Field(default_factory=dict)
    #: Threads of one actor on the CPU; by default what num_cpus says.
    threads: int | None = Field(default=None, ge=1)
    #: GPUs of one actor that share a model's weights.
    tensor_parallel: int = Field(default=1, ge=1)
    gpu_memory_utilization: PositiveFraction = 0.85
    #: GiB of key-value cache of an engine on the CPU.
    kv_cache_gib: float = Field(default=1, gt=0)
    #: Bounds the memory of prompt log-probs: vLLM needs about tokens x vocabulary x 6 B outside its own plan.
    max_num_batched_tokens: int = Field(default=2048, ge=64)
    max_num_seqs: int = Field(default=128, ge=1)
    #: Requests handed to an actor at a time, one published shard each: what a crash can cost at most.
    batch_size: int = Field(default=128, ge=1)
    #: Such batches under way at each actor.
    batches_in_flight: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _gpus_to_share(self) -> EngineResources:
        if self.tensor_parallel > max(1, self.num_gpus):
            raise ValueError(
                f"tensor_parallel: {self.tensor_parallel} GPUs are to share the weights, an actor has "
                f"{self.num_gpus:g}. Set num_gpus: {self.tensor_parallel}, or a smaller tensor_parallel"
            )
        return self


class EngineConfig(Section):
    """The engine that generates and scores."""

    kind: Literal["vllm", "transformers"] = "vllm"
    #: By default bfloat16 on GPUs and on CPUs that have it in hardware, else float32.
    dtype: Dtype = Field(default_factory=cpu_dtype)
    max_model_len: int = Field(default=2048, ge=16)
    pool: EngineResources = EngineResources()

    @model_validator(mode="after")
    def _dtype_on_gpus(self) -> EngineConfig:
        if self.pool.num_gpus and "dtype" not in self.model_fields_set:
            object.__setattr__(self, "dtype", "bfloat16")
        return self


class SamplingConfig(Section):
    """Sampling parameters of a request. temperature 0 is greedy."""

    temperature: float = Field(default=0.7, ge=0)
    top_p: PositiveFraction = 0.95
    max_tokens: int = Field(default=1024, ge=1)
    stop: tuple[str, ...] = ()


class SampleConfig(SamplingConfig):
    """How many responses each prompt gets (the released code samples 10)."""

    n: int = Field(default=10, ge=1)


class EndpointOptions(Section):
    """How an OpenAI-compatible endpoint is asked."""

    #: The environment variable that holds its key.
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = Field(default=16, ge=1)
    timeout_seconds: float = Field(default=120, gt=0)
    retries: int = Field(default=5, ge=0)


class JudgeConfig(EndpointOptions):
    """Who judges open answers against the backbone's (Table 3: win rate, both orders)."""

    url: str
    model: str


class TeacherConfig(EndpointOptions):
    """Who rewrites the negatives with the fewest edits (paper 4.2)."""

    kind: Literal["arithmetic", "model", "endpoint"]
    #: kind "model": folder or hub name run by the engine. kind "endpoint": the model's name there.
    model: str | None = None
    #: kind "endpoint": base URL of an OpenAI-compatible server.
    url: str | None = None
    sampling: SamplingConfig = SamplingConfig(temperature=0, max_tokens=1024)

    @model_validator(mode="after")
    def _complete(self) -> TeacherConfig:
        if self.kind in ("model", "endpoint") and self.model is None:
            raise ValueError(f"rewrite.model is needed for rewrite.kind: {self.kind}")
        if (self.kind == "endpoint") != (self.url is not None):
            raise ValueError("rewrite.url belongs to rewrite.kind: endpoint, and is needed there")
        return self
