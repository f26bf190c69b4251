"""Which input rows each file of a folder of shards answers, so that a job that goes on need not open the shards.

    index/<owner>-<number>.npz     some thousand files each, written by the driver of the run that made them

What an index file names counts only while the shard itself is there: a shard that somebody deletes is done again.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Bytes of the hash that stands for a row's id where millions are compared.
ID_BYTES = 12
_HASH = f"S{ID_BYTES}"


@dataclass(frozen=True)
class Answered:
    """F files, and hashes of the ids of the input rows that they answer.

    Attributes:
        files: names [F] in their folder, dtype S.
        counts: how many rows each answers [F] int64.
        hashes: of the rows' ids, in the order of the files [sum of counts] S12; see `hash_ids`.
    """

    files: np.ndarray
    counts: np.ndarray
    hashes: np.ndarray

    @classmethod
    def of(cls, files: Sequence[str], ids: Sequence[Sequence[str]]) -> Answered:
        """Of the names of files and the ids of the rows that each of them answers."""
        return cls(
            np.array([name.encode() for name in files], dtype="S"),
            np.array([len(one) for one in ids], dtype=np.int64),
            hash_ids([one for some in ids for one in some]),
        )

    @classmethod
    def join(cls, parts: Sequence[Answered]) -> Answered:
        """All parts after each other."""
        parts = [cls.of([], []), *parts]
        return cls(
            np.concatenate([part.files for part in parts]),
            np.concatenate([part.counts for part in parts]),
            np.concatenate([part.hashes for part in parts]),
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Answered:
        told = np.load(io.BytesIO(content), allow_pickle=False)
        return cls(told["files"], told["counts"], told["hashes"])

    def to_bytes(self) -> bytes:
        buffer = io.BytesIO()
        np.savez(buffer, files=self.files, counts=self.counts, hashes=self.hashes)
        return buffer.getvalue()

    def among(self, files: np.ndarray) -> np.ndarray:
        """Hashes of the rows whose file is one of `files`."""
        return self.hashes[np.repeat(np.isin(self.files, files), self.counts)]


def hash_ids(ids: Sequence[str]) -> np.ndarray:
    """One 12-byte hash for each id [N], dtype S12: a set of ten million takes 120 MB, not a gigabyte of strings."""
    digests = [hashlib.blake2b(one.encode(), digest_size=ID_BYTES).digest() for one in ids]
    return np.frombuffer(b"".join(digests), dtype=f"V{ID_BYTES}").view(_HASH)
