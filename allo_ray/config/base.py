"""What every config section shares: unknown keys are errors, values are frozen, resources stay out of cache keys."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Dtype = Literal["bfloat16", "float32"]
#: A number of processes, or (fewest, most) where it follows the cluster.
Count = int | tuple[int, int]


def bounds(count: Count) -> tuple[int, int]:
    """(fewest, most); the same number twice where it is fixed."""
    return (count, count) if isinstance(count, int) else count


@cache
def cpu_dtype() -> Dtype:
    """What this machine's CPU multiplies fast: bfloat16 where it has instructions for it, else float32.

    Without them (AVX2, torch 2.13, one core) bare bfloat16 products ran at 5 GFLOP/s, float32 ones at 32.
    """
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "float32"
    flags = next((line for line in told.splitlines() if line.lower().startswith(("flags", "features"))), "")
    return "bfloat16" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags.split()) else "float32"


class Section(BaseModel):
    """A section of the YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    #: True where the section says only how fast and where something runs, not what comes out.
    resources: ClassVar[bool] = False


def semantic(section: BaseModel) -> dict[str, Any]:
    """The part of a section that decides the result: everything but `resources` sections. Enters cache keys."""
    out: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            if not value.resources:
                out[name] = semantic(value)
        elif isinstance(value, (list, tuple)):
            out[name] = [semantic(item) if isinstance(item, BaseModel) else item for item in value]
        elif isinstance(value, dict):
            out[name] = {
                key: semantic(item) if isinstance(item, BaseModel) else item for key, item in value.items()
            }
        else:
            out[name] = value
    return out
