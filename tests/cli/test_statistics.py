"""Paired differences: the mean is exact, the interval holds it, and a shift of all chunks is found."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdistiller_peft.cli.statistics import paired_difference
from bitdistiller_peft.errors import DataError

CHUNKS = st.lists(st.floats(-10, 10), min_size=5, max_size=30)


@given(CHUNKS)
def test_a_model_does_not_differ_from_itself(chunks: list[float]) -> None:
    found = paired_difference(chunks, chunks)
    assert (found.difference, found.low, found.high, found.is_significant) == (0, 0, 0, False)


@given(CHUNKS, st.floats(0.01, 5))
def test_what_is_worse_on_every_chunk_by_the_same_amount_is_found(chunks: list[float], shift: float) -> None:
    found = paired_difference(chunks, [chunk + shift for chunk in chunks])
    assert found.difference == pytest.approx(shift)
    assert found.is_significant
    assert found.perplexity_ratio == pytest.approx(np.exp(shift))


def test_the_interval_is_about_as_wide_as_theory_has_it() -> None:
    """For many chunks the bootstrap agrees with the normal interval of the mean."""
    differences = np.random.default_rng(0).normal(0.1, 1.0, size=400)
    found = paired_difference(np.zeros(400).tolist(), differences.tolist())
    half = 1.96 * differences.std(ddof=1) / np.sqrt(400)
    assert found.low == pytest.approx(differences.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(differences.mean() + half, abs=0.1 * half)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    draws = [paired_difference([0.0] * 40, rng.normal(0.5, 1.0, size=40).tolist()) for _ in range(200)]
    assert 0.88 <= np.mean([found.low <= 0.5 <= found.high for found in draws]) <= 0.99


@pytest.mark.parametrize(("first", "other"), [([1.0] * 5, [1.0] * 6), ([1.0] * 4, [1.0] * 4)], ids=["unequal", "few"])
def test_what_cannot_be_paired_is_refused(first: list[float], other: list[float]) -> None:
    with pytest.raises(DataError):
        paired_difference(first, other)
