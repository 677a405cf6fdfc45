"""Paired comparison of two models on the same chunks of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bitdistiller_peft.errors import DataError

RESAMPLES = 10_000
LEVEL = 0.95
LEAST_CHUNKS = 5


@dataclass(frozen=True)
class Paired:
    """How much worse one model predicts than another.

    Attributes:
        difference: mean over chunks of `other - first`, in nats per token; positive: the other is worse.
        low: lower end of the 95 % interval.
        high: upper end.
        num_chunks: pairs.
    """

    difference: float
    low: float
    high: float
    num_chunks: int

    @property
    def is_significant(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0

    @property
    def perplexity_ratio(self) -> float:
        """The other's perplexity relative to the first's."""
        return math.exp(self.difference)


def paired_difference(first: Sequence[float], other: Sequence[float], *, seed: int = 0) -> Paired:
    """Compare two models chunk by chunk: what is hard for both cancels, so the interval is narrow.

    Percentile bootstrap over chunks. Chunks of one document are not independent, so the interval is, if anything, too
    narrow.

    Args:
        first: nats per token of each chunk.
        other: of the same chunks, in the same order.
        seed: of the resampling.

    Raises:
        DataError: the numbers of chunks differ, or there are too few for an interval.
    """
    import numpy as np

    if len(first) != len(other):
        raise DataError(f"models must be compared on the same chunks: got {len(first)} and {len(other)}.")
    if len(first) < LEAST_CHUNKS:
        raise DataError(
            f"a comparison needs {LEAST_CHUNKS} chunks for an interval: got {len(first)}. Use a longer text, a smaller "
            "--seq-len, or a larger --max-chunks."
        )
    differences = np.asarray(other, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(differences), size=(RESAMPLES, len(differences)))
    means = differences[picks].mean(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Paired(float(differences.mean()), float(low), float(high), len(differences))
