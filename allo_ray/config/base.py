"""What every config section shares: unknown keys are errors, values are frozen, resources stay out of cache keys."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Dtype = Literal["bfloat16", "float32"]
#: A number of processes, or (fewest, most) where it follows the cluster.
Count = int | tuple[int, int]

_BYTES = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}
_BYTES |= {"k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_RAYS_OWN = ("CPU", "GPU", "memory", "object_store_memory")


def _bytes(told: Any) -> Any:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]i|[kMGT])?", told) if isinstance(told, str) else None
    return told if match is None else float(match[1]) * _BYTES[match[2] or ""]


def _custom(told: dict[str, float]) -> dict[str, float]:
    for name in told:
        if name in _RAYS_OWN:
            raise ValueError(f"{name} is one of Ray's own resources: use the field for it, such as num_cpus")
    return told


#: A number of bytes; as a text also as Kubernetes writes it, such as 96Gi.
Bytes = Annotated[float, BeforeValidator(_bytes), Field(ge=0)]
#: Amounts of Ray's custom resources, by name: that a process takes, that a node offers.
Resources = Annotated[dict[str, Annotated[float, Field(gt=0)]], AfterValidator(_custom)]
Offered = Annotated[dict[str, Annotated[float, Field(ge=0)]], AfterValidator(_custom)]


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
    runtime: ClassVar[bool] = False


def semantic(section: BaseModel) -> dict[str, Any]:
    """The part of a section that decides the result: everything but `runtime` sections. Enters cache keys."""
    out: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            if not value.runtime:
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
