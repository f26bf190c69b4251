"""Indices as bytes and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_ray.neurons.encoding import decode, encode


@settings(deadline=None)
@given(st.data(), st.integers(1, 3000))
def test_round_trip(data: st.DataObject, size: int):
    indices = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), max_size=200))), dtype=np.int32)
    kind, encoded = encode(indices, size)
    assert decode(kind, encoded, size).tolist() == indices.tolist()


@pytest.mark.parametrize(
    ("indices", "kind", "length"),
    [
        ([0], "gaps", 1),  # the first neuron, 0 skipped
        ([254], "gaps", 1),  # 254 skipped still fit one byte
        ([255], "gaps", 2),  # 255 skipped: an escape, then 0
        ([9999], "gaps", 40),  # 9,999 = 39 * 255 + 54
        (range(0, 10_000, 10), "gaps", 1000),  # a tenth: a byte each beats 1,250 bytes of mask
        (range(0, 10_000, 5), "bits", 1250),  # a fifth: the mask wins
        (range(10_000), "bits", 1250),
        ([], "gaps", 0),
    ],
)
def test_size(indices: list[int], kind: str, length: int):
    """Of 10,000 neurons, the smaller of the two encodings, to the byte."""
    found, encoded = encode(np.array(indices, dtype=np.int32), 10_000)
    assert (found, len(encoded)) == (kind, length)
    assert decode(found, encoded, 10_000).tolist() == list(indices)
