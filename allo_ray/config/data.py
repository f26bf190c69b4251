"""Where prompts, pairs and evaluation questions come from, and how they are read."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from allo_ray.config.base import Fraction, Section


class Columns(Section):
    """Names of the user's columns. `chosen` and `rejected` hold text or lists of {role, content}."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    reference: str = "reference"
    #: Short gold answer; where the column is missing it is extracted from the reference.
    answer: str | None = None


class DataConfig(Section):
    """Training data: prompts with a reference (responses are then sampled), or ready preference pairs."""

    kind: Literal["prompts", "pairs"] = "prompts"
    #: `suite:<name>` (see evals/suites), a file, a folder or a pattern on any file system, or a hub name.
    path: str
    format: Literal["auto", "jsonl", "parquet", "datasets", "hub"] = "auto"
    split: str = "train"
    columns: Columns = Columns()
    #: Arguments of a suite (its generator's sizes, say).
    args: dict[str, Any] = Field(default_factory=dict)
    limit: int | None = Field(default=None, ge=1)
    #: "plain" (the prompt itself), "chat" (the tokenizer's chat template), "paper" (Table 6), or a text with {prompt}.
    template: str = "plain"
    #: The reference is a full response by a human and may serve as chosen (paper 4.1).
    reference_is_response: bool = False
    #: Longest prompt and longest prompt + response, in tokens. Longer rows are dropped and counted.
    max_prompt_tokens: int = Field(default=512, ge=1)
    max_tokens: int = Field(default=1024, ge=2)
    #: The run stops when the rules drop more than this share of the rows.
    max_dropped: Fraction = 0.05

    @model_validator(mode="after")
    def _template_has_prompt(self) -> DataConfig:
        if self.template not in ("plain", "chat", "paper") and "{prompt}" not in self.template:
            raise ValueError("template must be plain, chat, paper, or a text that contains {prompt}")
        return self


class SuiteConfig(Section):
    """One evaluation suite: its loader's arguments, how it is asked and how it is scored."""

    name: str
    #: Shown in tables; the suite's name by default.
    label: str | None = None
    path: str | None = None
    split: str = "test"
    args: dict[str, Any] = Field(default_factory=dict)
    template: str | None = None
    limit: int | None = Field(default=None, ge=1)

    @property
    def title(self) -> str:
        return self.label or self.name


class VerifyConfig(Section):
    """Which samples are right: the answer is the text after the last marker, compared by `kind`."""

    kind: Literal["exact", "numeric", "choice", "math", "callable"] = "exact"
    marker: str = "The answer is"
    #: What counts as the answer of a response without the marker.
    fallback: Literal["none", "whole", "last_line", "last_number"] = "none"
    #: "package.module:function" with (prompt, response, answer) -> bool, for kind "callable".
    function: str | None = None

    @model_validator(mode="after")
    def _function_for_callable(self) -> VerifyConfig:
        if (self.kind == "callable") != (self.function is not None):
            raise ValueError("verify.function belongs to verify.kind: callable, and is needed there")
        return self


class PairConfig(Section):
    """Right x wrong responses of a prompt (paper 4.1 and the released code: at most 5 a prompt)."""

    per_prompt: int = Field(default=5, ge=1)
    #: "random", or "hardest": the pairs that share the longest beginning first.
    choose: Literal["random", "hardest"] = "random"
    limit: int | None = Field(default=None, ge=1)
    #: The run stops when more than this share of the sampled pairs is longer than data.max_tokens.
    max_dropped: Fraction = 0.05
