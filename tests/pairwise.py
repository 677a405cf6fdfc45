"""Few cases in which every possible pair of settings occurs, for matrices too large to walk in full."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Factors = Mapping[str, tuple[Any, ...]]
# whether two values can stand together, by the names of their settings
Rules = Mapping[tuple[str, str], Callable[[Any, Any], bool]]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def is_possible(values: Mapping[str, Any], rules: Rules) -> bool:
    """Whether some of a case's values can stand together; every rule is about two of them."""
    return all(rule(*(values[k] for k in keys)) for keys, rule in rules.items() if all(k in values for k in keys))


def pairs_of(values: Mapping[str, Any]) -> Iterator[Pair]:
    """All pairs of settings in a case."""
    return itertools.combinations(values.items(), 2)


def all_pairs(factors: Factors) -> Iterator[Pair]:
    """All pairs of settings of different names, possible or not."""
    for a, b in itertools.combinations(factors, 2):
        yield from (((a, x), (b, y)) for x, y in itertools.product(factors[a], factors[b]))


def pairwise(factors: Factors, rules: Rules, seed: int = 0) -> list[dict[str, Any]]:
    """Cases in which every possible pair of values occurs, chosen greedily."""
    rng = random.Random(seed)
    left = {pair for pair in all_pairs(factors) if is_possible(dict(pair), rules)}
    cases: list[dict[str, Any]] = []
    while left:
        fixed = dict(min(left, key=repr))
        drawn = ({k: fixed.get(k, rng.choice(v)) for k, v in factors.items()} for _ in range(200))
        best = max((d for d in drawn if is_possible(d, rules)), key=lambda d: len(left.intersection(pairs_of(d))))
        left.difference_update(pairs_of(best))
        cases.append(best)
    return cases


def check_coverage(cases: Iterable[Mapping[str, Any]], factors: Factors, rules: Rules) -> None:
    """Every possible pair of settings is in some case, and no impossible one is."""
    covered = {pair for case in cases for pair in pairs_of(case)}
    for pair in all_pairs(factors):
        assert (pair in covered) == is_possible(dict(pair), rules), pair
