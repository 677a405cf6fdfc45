"""NormalFloat levels: values of a standard normal at evenly spaced probabilities, scaled to end at -1 and 1.

The two sides are spaced separately so that zero is a level: the negative side takes one half of the codes, zero and
the positive side the other. Source: QLoRA (arXiv 2305.14314), section 3; AFPQ (arXiv 2311.01792), appendix A, for the
3-bit table. The values are computed; tests compare them with the published NF3 and NF4 tables. Beside them stands the
published NF4 itself, for models that were quantized with it.
"""

from __future__ import annotations

from statistics import NormalDist

# NF4 as QLoRA (appendix E) prints it and bitsandbytes multiplies by it: computed there in fp32, so up to 2e-7 off
PUBLISHED_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def normal_float_levels(bits: int) -> tuple[float, ...]:
    """Compute the NormalFloat levels of a code width.

    Args:
        bits: code width, at least 2.

    Returns:
        ``2**bits`` increasing values from -1 to 1 with an exact 0 at index ``2**(bits - 1) - 1``.

    Source:
        ``offset = 1 - (1 / 2**(bits+1) + 1 / (2**(bits+1) - 2)) / 2`` is the outermost probability.
    """
    half = 1 << (bits - 1)
    offset = 1 - 0.5 * (1 / (4 * half) + 1 / (4 * half - 2))
    quantile = NormalDist().inv_cdf
    largest = quantile(offset)

    def side(count: int) -> list[float]:
        # `count` probabilities from `offset` down to, but without, one half (whose quantile is the zero level)
        return [quantile(offset - (offset - 0.5) * step / count) / largest for step in range(count)]

    negative = [-value for value in side(half - 1)]
    positive = side(half)[::-1]
    return (*negative, 0.0, *positive)
