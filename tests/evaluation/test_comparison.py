"""Paired differences: the mean is exact, the interval holds it, a shift is found, like is compared with like."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitdistiller_peft.errors import ConfigError, DataError
from bitdistiller_peft.evaluation import PerplexityResult, TaskResults, TaskScore, compare_results
from bitdistiller_peft.evaluation.comparison import NLL, RESAMPLES, paired_difference

CHUNKS = st.lists(st.floats(-10, 10), min_size=5, max_size=30)


def perplexity(chunks: list[float], protocol: str = "ppl/v1") -> PerplexityResult:
    return PerplexityResult(1.0, 0.0, 9, len(chunks), protocol, "packed", 0.0, tuple(chunks))


def scored(*samples: float, protocol: str = "lm-eval/1/mine", metric: str = "acc") -> TaskScore:
    value = sum(samples) / max(1, len(samples))
    return TaskScore("mine", metric, "none", value, None, True, len(samples), 0, protocol, True, samples=samples)


def results(*scores: TaskScore) -> TaskResults:
    return TaskResults(scores, "packed", 0.0)


@given(CHUNKS)
def test_a_model_does_not_differ_from_itself(chunks: list[float]) -> None:
    found = paired_difference(chunks, chunks)
    assert (found.difference, found.low, found.high, found.is_significant) == (0, 0, 0, False)


@given(CHUNKS, st.floats(0.01, 5))
def test_what_is_worse_on_every_chunk_by_the_same_amount_is_found(chunks: list[float], shift: float) -> None:
    found = paired_difference(chunks, [chunk + shift for chunk in chunks])
    assert found.difference == pytest.approx(shift)
    assert found.is_significant


def test_the_interval_is_that_of_the_textbook_bootstrap() -> None:
    first, other = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.5, 1.8, 3.9, 4.0, 5.2, 7.0]
    found, generator = paired_difference(first, other, seed=7), np.random.default_rng(7)
    means = sorted(
        sum(other[at] - first[at] for at in generator.integers(6, size=6)) / 6 for _ in range(RESAMPLES)
    )  # fmt: skip
    assert found.low == pytest.approx(np.quantile(means, 0.025), abs=0.02)
    assert found.high == pytest.approx(np.quantile(means, 0.975), abs=0.02)


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


def test_every_two_of_several_models_are_compared() -> None:
    chunks = {"a": [1.0] * 6, "b": [1.5] * 6, "c": [2.0] * 6}
    found = compare_results({name: perplexity(values) for name, values in chunks.items()})
    assert [(c.first, c.other, c.paired.difference) for c in found] == [
        ("a", "b", 0.5),
        ("a", "c", 1.0),
        ("b", "c", 0.5),
    ]
    assert {c.measure for c in found} == {NLL}


def test_tasks_are_compared_sample_by_sample_and_groups_not_at_all() -> None:
    first = results(scored(1, 0, 0, 1, 0, 0), replace(scored(metric="acc_norm"), value=0.5))
    other = results(scored(1, 1, 1, 1, 1, 0), replace(scored(metric="acc_norm"), value=0.6))
    (found,) = compare_results({"a": first, "b": other})
    assert (found.measure, found.paired.num_pairs) == ("mine/acc", 6)
    assert found.paired.difference == pytest.approx(0.5)


def test_only_like_is_compared_with_like() -> None:
    good = perplexity([1.0] * 6)
    with pytest.raises(DataError, match="same tokens and samples"):
        compare_results({"a": good, "b": perplexity([1.0] * 6, protocol="ppl/v2")})
    with pytest.raises(DataError, match="not at all"):
        compare_results({"a": results(scored(*[1.0] * 6)), "b": results()})
    for wrong in ({"a": good}, {"a": good, "b": results()}):
        with pytest.raises(ConfigError, match="two or more of one kind"):
            compare_results(wrong)  # type: ignore[arg-type]
