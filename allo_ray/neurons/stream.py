"""Writes safetensors files tensor by tensor, so that a file may be larger than memory.

The format: 8 bytes with the length of a JSON header (little-endian), the header, then the tensors' bytes in the
header's order. See https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

#: torch dtype -> the format's name for it.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(
    path: str | Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Writes a file whose tensors are asked for one at a time; it appears at `path` only when complete.

    Args:
        layout: dtype and shape of each tensor; larger elements first, as the format's readers like it aligned.
        read: gives the tensor of a name, with that dtype and shape.
        metadata: free text in the header.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    ordered = sorted(layout, key=lambda name: -layout[name][0].itemsize)
    offset = 0
    for name in ordered:
        dtype, shape = layout[name]
        end = offset + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name in ordered:
            tensor = read(name).detach().cpu().contiguous()
            assert (tensor.dtype, tuple(tensor.shape)) == (layout[name][0], tuple(layout[name][1])), name
            if tensor.numel():
                file.write(tensor.view(-1).view(torch.uint8).numpy().data)
    part.replace(path)
