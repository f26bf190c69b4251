"""Safetensors files here or behind a URL; of the latter only the tensors asked for are read, by byte range."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from allo_ray.neurons.stream import DTYPES

#: Bytes asked for at once: what reading takes beside the tensor.
PIECE = 1 << 24
_TORCH = {code: dtype for dtype, code in DTYPES.items()}


def open_file(path: str | Path) -> Any:
    """A safetensors file, whose tensors, and slices of them, are read when asked for: `safe_open`, or like it.

    Raises:
        OSError: there is no such file.
        SafetensorError: it is no safetensors file.
    """
    return RangeFile(str(path)) if "://" in str(path) else safe_open(str(path), framework="pt")


class RangeFile:
    """A safetensors file behind a URL, with what `safe_open` has and is used here."""

    def __init__(self, url: str) -> None:
        self._files, self._path = fsspec.core.url_to_fs(url)
        length = int.from_bytes(self._files.cat_file(self._path, 0, 8), "little")
        try:
            header = json.loads(self._files.cat_file(self._path, 8, 8 + length))
        except ValueError as error:
            raise SafetensorError(f"{url}: no header of safetensors ({error})") from None
        self._start = 8 + length
        self._metadata = header.pop("__metadata__", None)
        self._entries = header

    def keys(self) -> list[str]:
        return list(self._entries)

    def metadata(self) -> dict[str, str] | None:
        return self._metadata

    def get_slice(self, name: str) -> RangeSlice:
        return RangeSlice(self, self._entries[name])

    def get_tensor(self, name: str) -> Tensor:
        entry = self._entries[name]
        return self.read(entry, *entry["data_offsets"]).view(entry["shape"])

    def read(self, entry: dict[str, Any], begin: int, end: int) -> Tensor:
        """Bytes [begin, end) behind the header, as a flat tensor of the entry's dtype."""
        found = torch.empty(end - begin, dtype=torch.uint8)
        for at in range(begin, end, PIECE):
            stop = min(at + PIECE, end)
            piece = bytearray(self._files.cat_file(self._path, self._start + at, self._start + stop))
            found[at - begin : stop - begin] = torch.frombuffer(piece, dtype=torch.uint8)
        return found.view(_TORCH[entry["dtype"]])


@dataclass(frozen=True)
class RangeSlice:
    """One tensor of a file; `[a:b]` reads a part of a flat one."""

    file: RangeFile
    entry: dict[str, Any]

    def get_shape(self) -> list[int]:
        return self.entry["shape"]

    def get_dtype(self) -> str:
        return self.entry["dtype"]

    def __getitem__(self, part: slice) -> Tensor:
        begin, end = self.entry["data_offsets"]
        [size] = self.entry["shape"]
        start, stop, _ = part.indices(size)
        width = (end - begin) // max(1, size)
        return self.file.read(self.entry, begin + start * width, begin + max(start, stop) * width)
