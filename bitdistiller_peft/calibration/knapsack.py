"""Choose one of several options for every item, so that the sum of costs is smallest and the sum of sizes fits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MAX_STATES = 1 << 18
"""Sizes are counted in units so large that there are at most so many, rounded up: the limit always holds."""


def choose(sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], limit: int) -> list[int] | None:
    """Solve the multiple-choice knapsack problem exactly, by dynamic programming over sizes.

    Args:
        sizes: for each item, the size of each of its options, not negative.
        costs: in the same order; finite.
        limit: what the chosen sizes may add up to.

    Returns:
        The index of the chosen option of each item, or `None` where even the smallest ones do not fit.
    """
    least = [min(options) for options in sizes]
    room = limit - sum(least)
    if room < 0:
        return None
    extra = [[size - small for size in options] for options, small in zip(sizes, least, strict=True)]
    most = sum(max(options) for options in extra)
    room = min(room, most)
    exact = math.gcd(*(size for options in extra for size in options)) or 1
    unit = exact * math.ceil((room // exact + 1) / MAX_STATES)
    states = room // unit + 1
    best, picks = np.zeros(states), []
    for options, prices in zip(extra, costs, strict=True):
        trials = np.full((len(options), states), np.inf)
        for index, (size, price) in enumerate(zip(options, prices, strict=True)):
            steps = -(-size // unit)
            if steps < states:
                trials[index, steps:] = best[: states - steps] + price
        picks.append(trials.argmin(0).astype(np.int16))
        best = trials.min(0)
    chosen, state = [], states - 1
    for options, pick in zip(reversed(extra), reversed(picks), strict=True):
        index = int(pick[state])
        chosen.append(index)
        state -= -(-options[index] // unit)
    return chosen[::-1]
