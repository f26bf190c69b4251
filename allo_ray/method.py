"""The method as a graph: which stages a config has, what each reads, and which settings decide its result.

model - prompts - sft - sample - pairs - reference - warmup - importance - locate (k1, k2)
                                   pairs - rewrite - reward - token scores (P_re)
forget (k1, u) - reference of the forgotten model - learn (k2, v) - evaluate
"""

from __future__ import annotations

from typing import Any

from allo_ray.config.base import Section, semantic
from allo_ray.config.data import DataConfig
from allo_ray.config.run import RunConfig
from allo_ray.data.sources import fingerprint as data_fingerprint
from allo_ray.models import source_fingerprint
from allo_ray.pipeline import Node
from allo_ray.stages.evaluate import EVALUATE, MODEL_ROLE
from allo_ray.stages.importance import IMPORTANCE
from allo_ray.stages.locate import LOCATE, located
from allo_ray.stages.model import MODEL
from allo_ray.stages.pairs import PAIRS, READ_PAIRS
from allo_ray.stages.prompts import PROMPTS
from allo_ray.stages.reference import REFERENCE
from allo_ray.stages.rewrite import REWRITE
from allo_ray.stages.sample import SAMPLE
from allo_ray.stages.supervised import REWARD, SFT
from allo_ray.stages.token_scores import TOKEN_SCORES
from allo_ray.stages.train import BASELINE, FORGET, LEARN, WARMUP

#: Names of the evaluated models: node -> what tables call it.
LABELS = {"backbone": "SFT", "warmup": "DPO", "forget": "forgotten", "learn": "ALLO"}


def graph(config: RunConfig) -> list[Node]:
    """Returns the nodes of a run, each after its inputs."""
    nodes: dict[str, Node] = {}

    def add(name: str, stage: Any, settings: dict[str, Any], **inputs: str) -> str:
        nodes[name] = Node(name, stage, settings, inputs)
        return name

    def part(section: Section | None, *without: str) -> dict[str, Any]:
        values = semantic(section) if section is not None else {}
        return {key: value for key, value in values.items() if key not in without}

    def source(data: DataConfig) -> dict[str, Any]:
        return {**semantic(data), "content": data_fingerprint(data)}

    def prompts(data: DataConfig) -> dict[str, Any]:
        # How long a pair may be says nothing of a prompt: another max_tokens draws no sample again.
        told = {key: value for key, value in source(data).items() if key != "max_tokens"}
        return {"data": told, "verify": part(config.verify)}

    seed, engine = config.seed, part(config.engine)
    model = {**part(config.model), "content": source_fingerprint(config.model)}
    backbone = add("model", MODEL, {"model": model})
    if config.data.kind == "prompts":
        add("prompts", PROMPTS, prompts(config.data), model="model")
    if config.sft is not None:
        rows = "prompts"
        if config.sft.data is not None:
            rows = add("sft prompts", PROMPTS, prompts(config.sft.data), model="model")
        limit = (config.sft.data or config.data).max_tokens
        settings = {"train": part(config.sft, "data"), "seed": seed, "max_tokens": limit}
        backbone = add("sft", SFT, settings, start="model", prompts=rows)
    if config.data.kind == "prompts":
        settings = {"sample": part(config.sample), "engine": engine, "seed": seed}
        add("sample", SAMPLE, settings, model=backbone, prompts="prompts")
        settings = {
            "verify": part(config.verify),
            "pair": part(config.pair),
            "seed": seed,
            "data": part(config.data),
        }
        add("pairs", PAIRS, settings, model=backbone, prompts="prompts", samples="sample")
    else:
        settings = {"data": source(config.data), "pair": part(config.pair), "seed": seed}
        # The start model has the backbone's tokenizer: rows are found wrong before anything is trained.
        add("pairs", READ_PAIRS, settings, model="model")

    def reference(start: str, dtype: str) -> str:
        name = "reference" if start == backbone else f"reference of {start}"
        if dtype != config.warmup.dtype:
            name = f"{name} ({dtype})"
        return add(name, REFERENCE, {"dtype": dtype}, start=start, pairs="pairs")

    def trained(name: str, stage: Any, section: Any, start: str, against: str, **inputs: str) -> str:
        settings = {"train": part(section), "seed": seed}
        return add(name, stage, settings, start=start, pairs="pairs", reference=against, **inputs)

    base = reference(backbone, config.warmup.dtype)
    trained("warmup", WARMUP, config.warmup, backbone, base)

    def locate(k: float) -> str:
        add("importance", IMPORTANCE, {}, start=backbone, tuned="warmup")
        settings = {"k": k, "locate": part(config.locate), "seed": seed}
        return add(located(k), LOCATE, settings, importance="importance")

    tail = backbone
    if config.forget is not None:
        scored = {}
        if config.forget.weight != "none":
            scored["scores"] = _token_scores(config, add, part, backbone)
        against = reference(backbone, config.forget.dtype)
        selection = locate(config.forget.k)
        tail = trained("forget", FORGET, config.forget, backbone, against, selection=selection, **scored)
    if config.learn is not None:
        start = tail if config.learn.reference == "start" else backbone
        against = reference(start, config.learn.dtype)
        tail = trained("learn", LEARN, config.learn, tail, against, selection=locate(config.learn.k))
    for name, baseline in config.baselines.items():
        against = reference(backbone, baseline.dtype)
        roles = {} if baseline.k == 1 else {"selection": locate(baseline.k)}
        if baseline.needs_scores:
            roles["scores"] = _token_scores(config, add, part, backbone)
        trained(f"baseline {name}", BASELINE, baseline, backbone, against, **roles)
    asked = [name for name in nodes if name in ("warmup", "forget", "learn") or name.startswith("baseline ")]
    settings = {"evaluate": part(config.evaluate), "engine": engine, "verify": part(config.verify)}
    evaluated = {"SFT": backbone, **{label(name): name for name in asked}}
    drawn = {"prompts": "prompts", "samples": "sample"} if config.data.kind == "prompts" else {}
    models = {f"{MODEL_ROLE}{name}": node for name, node in evaluated.items()}
    add("evaluate", EVALUATE, settings, **models, **drawn)
    return list(nodes.values())


def label(node: str) -> str:
    """What tables call the model of a node."""
    return LABELS.get(node, node.removeprefix("baseline "))


def _token_scores(config: RunConfig, add: Any, part: Any, backbone: str) -> str:
    rewrite, reward = config.rewrite, config.reward
    assert rewrite is not None
    assert reward is not None
    verify = part(config.verify)
    settings = {
        "teacher": part(rewrite, "concurrency", "timeout_seconds", "retries", "key_variable"),
        "verify": verify,
    }
    start = backbone
    if reward.model is not None:
        other = config.model.model_copy(update={"path": reward.model, "revision": None})
        start = add("reward start", MODEL, {"model": {**part(other), "content": source_fingerprint(other)}})
    add("rewrite", REWRITE, settings, model=start, pairs="pairs")
    settings = {
        "train": part(reward, "model"),
        "seed": config.seed,
        "max_tokens": config.engine.max_model_len,
    }
    add("reward", REWARD, settings, start=start, rewrites="rewrite")
    settings = {"engine": part(config.engine)}
    return add("token scores", TOKEN_SCORES, settings, model="reward", policy=backbone, pairs="pairs")
