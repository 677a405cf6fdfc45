"""Paired comparison of models on the same chunks or samples: what is hard for both cancels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from bitdistiller_peft.errors import ConfigError, DataError
from bitdistiller_peft.evaluation.perplexity import PerplexityResult
from bitdistiller_peft.evaluation.task_results import TaskResults

RESAMPLES = 10_000
LEVEL = 0.95
LEAST_PAIRS = 5
NLL = "nats per token"
METHOD = (
    "Every two models on the same chunks and samples; 95 % percentile bootstrap over them, 10,000 resamples. Each "
    "interval stands for itself: of twenty, one is expected to miss."
)


@dataclass(frozen=True)
class Paired:
    """By how much one model scores above another.

    Attributes:
        difference: mean over pairs of `other - first`.
        low: lower end of the 95 % interval.
        high: upper end.
        num_pairs: chunks or samples.
    """

    difference: float
    low: float
    high: float
    num_pairs: int

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Comparison:
    """Two models in one measure.

    Attributes:
        measure: ``"nats per token"``, or task and metric.
        first: name of the model that is compared with.
        other: name of the other one.
        paired: the difference, other minus first.
    """

    measure: str
    first: str
    other: str
    paired: Paired


def compare_results(
    results: Mapping[str, PerplexityResult] | Mapping[str, TaskResults], *, seed: int = 0
) -> tuple[Comparison, ...]:
    """Compare every two of several models, measure by measure.

    Task scores that are no mean over samples, such as those of groups, are left out.

    Args:
        results: by name of the model, of one kind.
        seed: of the resampling.

    Raises:
        ConfigError: fewer than two results, or results of two kinds.
        DataError: they were not measured on the same chunks or samples, or on too few for an interval.

    Example:
        >>> results = {"before": evaluate_perplexity(...), "after": evaluate_perplexity(...)}  # doctest: +SKIP
        >>> compare_results(results)[0].paired.is_significant  # doctest: +SKIP
    """
    kinds = {type(result).__name__ for result in results.values()}
    if len(results) < 2 or len(kinds) != 1:
        raise ConfigError(
            f"`results` must be two or more of one kind: got {len(results)} of {sorted(kinds)}. "
            "Compare perplexities with perplexities and tasks with tasks."
        )
    measured = {name: dict(_measures(result)) for name, result in results.items()}
    return tuple(
        _compare(measure, (first, measured[first][measure]), (other, measured[other].get(measure)), seed)
        for first, other in combinations(measured, 2)
        for measure in measured[first]
    )


def paired_difference(first: Sequence[float], other: Sequence[float], *, seed: int = 0) -> Paired:
    """Compare two models pair by pair.

    Percentile bootstrap over pairs. Chunks of one document are not independent, so the interval is, if anything, too
    narrow.

    Args:
        first: a number per chunk or sample.
        other: of the same chunks or samples, in the same order.
        seed: of the resampling.

    Raises:
        DataError: the numbers of pairs differ, or there are too few for an interval.
    """
    if len(first) != len(other):
        raise DataError(f"models must be compared on the same chunks: got {len(first)} and {len(other)}.")
    if len(first) < LEAST_PAIRS:
        raise DataError(
            f"a comparison needs {LEAST_PAIRS} chunks or samples for an interval: got {len(first)}. Use a longer text, "
            "a smaller `seq_len`, or a larger `max_chunks` or `limit`."
        )
    differences = np.asarray(other, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    means = _resampled_means(differences, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Paired(float(differences.mean()), float(low), float(high), len(differences))


def _resampled_means(differences: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Means of resamples, `[RESAMPLES]`; some at a time, since a task can have ten thousand samples."""
    step = max(1, (1 << 22) // len(differences))
    sizes = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    parts = [differences[generator.integers(len(differences), size=(n, len(differences)))].mean(axis=1) for n in sizes]
    return np.concatenate(parts)


def _measures(result: PerplexityResult | TaskResults) -> Iterator[tuple[str, tuple[str, tuple[float, ...]]]]:
    """Name, protocol and numbers of whatever can be paired."""
    if isinstance(result, PerplexityResult):
        yield NLL, (result.protocol, result.chunk_nll_nats)
        return
    for score in result.scores:
        if score.samples:
            yield score.name, (score.protocol, score.samples)


_Measured = tuple[str, tuple[float, ...]]


def _compare(measure: str, first: tuple[str, _Measured], other: tuple[str, _Measured | None], seed: int) -> Comparison:
    (first_name, (protocol, numbers)), (other_name, theirs) = first, other
    if theirs is None or theirs[0] != protocol:
        found = "not at all" if theirs is None else f"as {theirs[0]}"
        raise DataError(
            f"models must be compared on the same tokens and samples: {first_name} was measured as {protocol}, "
            f"{other_name} {found}. Their tokenizers or settings differ."
        )
    return Comparison(measure, first_name, other_name, paired_difference(numbers, theirs[1], seed=seed))
