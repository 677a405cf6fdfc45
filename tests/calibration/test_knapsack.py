"""The knapsack against a search through everything, and its limit when sizes are rounded."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdistiller_peft.calibration import knapsack
from bitdistiller_peft.calibration.knapsack import choose

ITEMS = st.lists(
    st.lists(st.tuples(st.integers(0, 40), st.floats(0, 10)), min_size=1, max_size=3), min_size=1, max_size=5
)


def cheapest(sizes: list[list[int]], costs: list[list[float]], limit: int) -> float | None:
    """By trying all."""
    found = [
        sum(row[i] for row, i in zip(costs, picks, strict=True))
        for picks in itertools.product(*(range(len(row)) for row in sizes))
        if sum(row[i] for row, i in zip(sizes, picks, strict=True)) <= limit
    ]
    return min(found, default=None)


@given(ITEMS, st.integers(0, 120), st.sampled_from([1, 7, 4096]))
def test_no_other_choice_that_fits_costs_less(items: list[list[tuple[int, float]]], limit: int, unit: int) -> None:
    sizes = [[size * unit for size, _ in row] for row in items]
    costs = [[cost for _, cost in row] for row in items]
    picks = choose(sizes, costs, limit * unit)
    best = cheapest(sizes, costs, limit * unit)
    if picks is None:
        assert best is None
        return
    assert sum(row[i] for row, i in zip(sizes, picks, strict=True)) <= limit * unit
    assert sum(row[i] for row, i in zip(costs, picks, strict=True)) == pytest.approx(best)


def test_coarse_sizes_never_break_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knapsack, "MAX_STATES", 16)
    generator = random.Random(0)
    for _ in range(200):
        sizes = [[generator.randrange(1, 10_000) for _ in range(3)] for _ in range(6)]
        costs = [[generator.random() for _ in range(3)] for _ in range(6)]
        limit = sum(min(row) for row in sizes) + generator.randrange(20_000)
        picks = choose(sizes, costs, limit)
        assert picks is not None
        assert sum(row[i] for row, i in zip(sizes, picks, strict=True)) <= limit
