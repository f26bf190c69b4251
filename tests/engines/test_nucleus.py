"""keep_nucleus against the definition, and against vLLM's own sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allo_ray.engines.nucleus import keep_nucleus


def by_definition(logits: np.ndarray, p: float) -> set[int]:
    """The fewest tokens, most likely first, whose probabilities reach p; those as likely as the last one too."""
    probs = np.exp(logits - logits.max())
    probs = (probs / probs.sum()).astype(np.float32)
    order = np.argsort(-probs, kind="stable")
    total, last = 0.0, probs[order[0]]
    for token in order:
        if total >= p:
            break
        total += float(probs[token])
        last = probs[token]
    return {int(token) for token in np.flatnonzero(probs >= last)}


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.floats(0.05, 0.999), st.floats(0.2, 6.0))
def test_it_is_the_nucleus(seed: int, p: float, spread: float) -> None:
    logits = torch.randn(3, 257, generator=torch.Generator().manual_seed(seed)) * spread
    probs = logits.softmax(-1, dtype=torch.float32).double()
    kept = keep_nucleus(logits.clone(), torch.full((3,), p))
    for row, masked, prob in zip(logits, kept, probs, strict=True):
        inside = {int(i) for i in torch.isfinite(masked).nonzero()}
        ordered = prob.sort(descending=True).values
        reach = (ordered.cumsum(0) - ordered) / prob.sum()
        if (reach - p).abs().min() > 1e-6:  # a cut that float rounding cannot move
            assert inside == by_definition(row.numpy().astype(np.float64), p)
        assert torch.equal(row[torch.isfinite(masked)], masked[torch.isfinite(masked)])


def test_one_keeps_everything_and_a_little_keeps_the_best() -> None:
    """p = 1 masks nothing; p = 0.1 of probabilities (0.7, 0.2, 0.1) keeps the first; 0.75 keeps two."""
    logits = torch.tensor([[0.1, 0.7, 0.2]] * 3).log()
    kept = keep_nucleus(logits, torch.tensor([1.0, 0.1, 0.75])).isfinite()
    assert kept.tolist() == [[True, True, True], [False, True, False], [False, True, True]]


def test_ties_at_the_cut_all_stay() -> None:
    logits = torch.zeros(1, 8)
    assert keep_nucleus(logits, torch.tensor([0.5])).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 64, dtype=dtype)
    out = keep_nucleus(logits, torch.tensor([0.5, 0.9]))
    assert out.dtype == dtype
    assert out.data_ptr() == logits.data_ptr()
