"""A full model from a base and deltas, written file by file; memory: two tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allo_ray.errors import UserError
from allo_ray.models import fingerprint
from allo_ray.neurons.delta import Delta
from allo_ray.neurons.masters import Masters
from allo_ray.neurons.stream import DTYPES, write_safetensors

#: Endings of weight files, in whatever format; only safetensors are written.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}
_TORCH = {code: dtype for dtype, code in DTYPES.items()}


def export(
    base: str | Path,
    deltas: Sequence[str | Path | Delta],
    out: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a Hugging Face folder with the base's files and the deltas' values.

    A tensor that no delta touches keeps its bytes where its dtype stays; a trained one is its float32 master cast to
    the dtype, which is bit for bit what training computed with.

    Args:
        base: folder of the base model.
        deltas: over it, in order.
        out: folder to write; made where it is missing.
        dtype: of every floating-point parameter; as stored in the base by default.

    Raises:
        UserError: a delta is over another base.
    """
    masters = Masters(base, deltas)
    named = next((delta for delta in masters.deltas if delta.base), None)
    if named is not None and (found := fingerprint(base)) != named.base:
        raise UserError(
            f"{named.origin}: made over a base with the fingerprint {named.base}, but {base} has {found}. "
            "Name the folder that it was trained from."
        )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _copy_others(Path(base), out, dtype)
    sizes, places = 0, {}
    for file in masters.stored.files:
        layout = _write(masters, file, out / file, dtype)
        for name, (kind, shape) in layout.items():
            places[name] = file
            sizes += torch.Size(shape).numel() * kind.itemsize
    if len(masters.stored.files) > 1:
        index = {"metadata": {"total_size": sizes}, "weight_map": places}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write(
    masters: Masters, file: str, out: Path, dtype: torch.dtype | None
) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Writes one weight file and returns the dtype and shape of its tensors."""
    handle = masters.stored.open(file)
    names = masters.stored.first_names
    layout: dict[str, tuple[torch.dtype, list[int]]] = {}
    for name in handle.keys():  # noqa: SIM118
        part: Any = handle.get_slice(name)
        kept = _TORCH[part.get_dtype()]
        layout[name] = (dtype if dtype and name in names else kept, part.get_shape())

    def read(name: str) -> Tensor:
        kind = layout[name][0]
        if name in names and masters.touches(names[name]):
            return masters.read(names[name]).to(kind)
        return handle.get_tensor(name).to(kind)

    write_safetensors(out, layout, read, handle.metadata() or {"format": "pt"})
    return layout


def _copy_others(base: Path, out: Path, dtype: torch.dtype | None) -> None:
    """Copies tokenizer, config and whatever else lies beside the weights; the config tells the new dtype."""
    for path in base.iterdir():
        if not path.is_file() or path.suffix in WEIGHTS or path.name.endswith(".index.json"):
            continue
        if path.name == "config.json" and dtype is not None:
            config = json.loads(path.read_text(encoding="utf-8"))
            config.pop("torch_dtype", None)
            config["dtype"] = str(dtype).removeprefix("torch.")
            (out / path.name).write_text(json.dumps(config, indent=2), encoding="utf-8")
        else:
            shutil.copyfile(path, out / path.name)
