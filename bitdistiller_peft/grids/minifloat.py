"""Levels of tiny floating-point formats: a sign, a few exponent bits, a few mantissa bits, no infinities and no NaN.

At 4 bits the format is E2M1 (0, ±0.5, 1, 1.5, 2, 3, 4, 6), at 3 bits E2M0 (0, ±1, 2, 4). A format has two zeros; as
levels they are one, so `2**bits - 1` levels remain and one code is spare. Source: AFPQ (arXiv 2311.01792), appendix A.
"""

from __future__ import annotations

# what remains of the width beside the sign and two exponent bits is mantissa
EXPONENT_BITS = 2


def minifloat_levels(exponent_bits: int, mantissa_bits: int) -> tuple[float, ...]:
    """List the values of a format whose exponent bias makes 1 its smallest normal number.

    Args:
        exponent_bits: width of the exponent, at least 1; all-zero bits mean subnormal numbers.
        mantissa_bits: width of the mantissa, at least 0.

    Returns:
        ``2**(1 + exponent_bits + mantissa_bits) - 1`` increasing values, mirror images around an exact 0.
    """
    steps = 1 << mantissa_bits
    subnormal = [step / steps for step in range(1, steps)]
    normal = [
        2.0 ** (exponent - 1) * (1 + step / steps) for exponent in range(1, 1 << exponent_bits) for step in range(steps)
    ]
    positive = (*subnormal, *normal)
    return (*(-level for level in reversed(positive)), 0.0, *positive)
