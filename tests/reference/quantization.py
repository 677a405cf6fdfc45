"""The second opinion on quantization: Python numbers, one weight at a time, straight from the definitions.

Weights arrive as Python floats that fp32 holds exactly. One fp32 operation is the double operation rounded once more:
double has more than twice fp32's digits, so the second rounding never changes the first.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from math import ceil, floor, frexp, fsum, inf
from typing import NamedTuple

Rows = Sequence[Sequence[float]]

DIGITS = {"float16": 11, "bfloat16": 8, "float32": 24}  # bits of the significand, the leading one among them
MIN_EXPONENT = {"float16": -14, "bfloat16": -126, "float32": -126}
MAX_EXPONENT = {"float16": 15, "bfloat16": 127, "float32": 127}


class Quantized(NamedTuple):
    """One group, or one matrix of them."""

    codes: list
    values: list
    scale: object
    zero_point: object = None
    scale_negative: object = None
    scale_residual: object = None


def f32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def f32_bits(value: float) -> int:
    """The bit pattern of an fp32 number as torch views it, a signed integer; it tells -0 from 0."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


# ------------------------------------------------------------------------------------------------------------- scales


def in_ulps(value: float, dtype: str, spare_bits: int = 0) -> tuple[Fraction, Fraction]:
    """How many steps of the format's spacing a number is, and that spacing, with some last digits left unused."""
    exponent = max(frexp(value)[1] - 1, MIN_EXPONENT[dtype])
    ulp = Fraction(2) ** (exponent - DIGITS[dtype] + spare_bits + 1)
    return abs(Fraction(value)) / ulp, ulp


def store_up(value: float, dtype: str, spare_bits: int = 0) -> float:
    """The smallest number of the format that is not below a value ``>= 0``; infinity where there is none."""
    steps, ulp = in_ulps(value, dtype, spare_bits)
    stored = ceil(steps) * ulp
    return float(stored) if stored < Fraction(2) ** (MAX_EXPONENT[dtype] + 1) else inf


def store_nearest(value: float, dtype: str) -> float:
    """The nearest number of the format, of two equally near the even one; the smallest normal number at least."""
    smallest = Fraction(2) ** MIN_EXPONENT[dtype]
    if value <= smallest:
        return float(smallest)
    steps, ulp = in_ulps(value, dtype)
    below = floor(steps)
    above_half, tie = steps - below > Fraction(1, 2), steps - below == Fraction(1, 2)
    return float((below + 1 if above_half or (tie and below % 2) else below) * ulp)


# ------------------------------------------------------------------------------------------------------------- affine


def affine_params(
    group: Sequence[float], bits: int, dtype: str, zero_point_range: tuple[int, int] | None = None
) -> tuple[float, int]:
    top = 2**bits - 1
    low, high = min(0.0, *group), max(0.0, *group)
    scale = store_up(f32(f32(high - low) / top) or 1.0, dtype)
    first, last = zero_point_range or (0, top)
    zero_point = min(max(round(f32(-low / scale)), first), last)
    if zero_point_range is not None:
        above = f32(high / (top - zero_point)) if zero_point < top else 0.0
        below = f32(-low / zero_point) if zero_point > 0 else 0.0
        scale = store_up(max(above, below) or 1.0, dtype)
    return scale, zero_point


def symmetric_scale(group: Sequence[float], bits: int, dtype: str) -> float:
    largest = max(abs(weight) for weight in group)
    return store_up(f32(2 * largest / (2**bits - 1)) or 1.0, dtype)


def affine_code(weight: float, scale: float, zero_point: int, bits: int) -> int:
    """Python's `round` takes ties to even, as the definition does."""
    return min(max(round(f32(weight / scale)) + zero_point, 0), 2**bits - 1)


def affine_value(code: int, scale: float, zero_point: int) -> float:
    return f32(scale * (code - zero_point))


def affine_group(
    group: Sequence[float],
    bits: int,
    dtype: str,
    *,
    symmetric: bool = False,
    zero_point_range: tuple[int, int] | None = None,
) -> Quantized:
    if symmetric:
        scale, zero_point = symmetric_scale(group, bits, dtype), 2 ** (bits - 1)
    else:
        scale, zero_point = affine_params(group, bits, dtype, zero_point_range)
    codes = [affine_code(weight, scale, zero_point, bits) for weight in group]
    values = [affine_value(code, scale, zero_point) for code in codes]
    return Quantized(codes, values, scale, None if symmetric else zero_point)


# --------------------------------------------------------------------------------------------------------------- fine


def fine_group(group: Sequence[float], bits: int, dtype: str) -> Quantized:
    """Zero points in quarters about the middle; where the range's own lies beyond, the nearest, and all still fit."""
    top = 2**bits - 1
    low, high = min(0.0, *group), max(0.0, *group)
    scale = store_up(f32(f32(high - low) / top) or 2.0**-14, dtype)
    code = round(f32(f32(f32(-low / scale) - 3 * top / 8) * 4))
    inside = min(max(code, 0), top)
    zero = 3 * top / 8 + inside / 4
    if code != inside:
        scale = store_up(max(f32(high / (top - zero)), f32(-low / zero)) or 2.0**-14, dtype)
    codes = [min(max(round(f32(f32(weight / scale) + zero)), 0), top) for weight in group]
    return Quantized(codes, [f32(scale * (each - zero)) for each in codes], scale, inside)


# ----------------------------------------------------------------------------------------------------------- codebook


def codebook_scales(
    group: Sequence[float], levels: Sequence[float], dtype: str, *, symmetric: bool
) -> tuple[float, float]:
    """The scales of the positive and of the negative weights; 0 for a sign that does not occur."""
    positive = f32(max(0.0, *group) / levels[-1])
    negative = f32(min(0.0, *group) / levels[0])
    if symmetric:
        both = store_up(max(positive, negative) or 1.0, dtype)
        return both, both
    if positive == negative == 0.0:
        positive = 1.0
    return store_up(positive, dtype), store_up(negative, dtype)


def nearest_level(x: float, levels: Sequence[float]) -> int:
    """Walk up while the weight lies above the middle of this level and the next; the middle itself belongs below."""
    code = 0
    while code < len(levels) - 1 and x > f32((levels[code] + levels[code + 1]) / 2):
        code += 1
    return code


def codebook_group(group: Sequence[float], levels: Sequence[float], dtype: str, *, symmetric: bool) -> Quantized:
    positive, negative = codebook_scales(group, levels, dtype, symmetric=symmetric)
    codes, values = [], []
    for weight in group:
        scale = negative if weight < 0 else positive
        code = nearest_level(f32(weight / scale) if scale else weight, levels)
        level = f32(levels[code])
        codes.append(code)
        values.append(f32(level * (negative if level < 0 else positive)))
    return Quantized(codes, values, positive, None, None if symmetric else negative)


# -------------------------------------------------------------------------------------------------- ternary, residual


def mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)


def ternary_group(group: Sequence[float], dtype: str) -> Quantized:
    """BitNet's absmean: round to the nearest of -1, 0 and 1 means."""
    scale = store_up(f32(mean([abs(weight) for weight in group])) or 1.0, dtype)
    codes = [min(max(round(f32(weight / scale)), -1), 1) + 1 for weight in group]
    return Quantized(codes, [f32(scale * (code - 1)) for code in codes], scale)


def residual_code(weight: float, scale: float, residual: float) -> int:
    """The sign of the weight for the larger scale, the sign of what that leaves for the other; zero is positive."""
    is_swapped = residual > scale
    larger = Fraction(residual if is_swapped else scale)
    first = weight >= 0
    second = Fraction(weight) - (larger if first else -larger) >= 0
    return 2 * second + first if is_swapped else 2 * first + second


def residual_value(code: int, scale: float, residual: float) -> float:
    return f32((scale if code >= 2 else -scale) + (residual if code % 2 else -residual))


def residual_scales(group: Sequence[float], dtype: str, refine: str | None, tied: bool) -> tuple[float, float]:
    """Greedy scales, then as many rounds of least squares for the nearest codes as `refine` says."""
    spare = 2 if tied else 0
    magnitudes = [abs(weight) for weight in group]
    first = f32(mean(magnitudes)) or (2.0 ** MIN_EXPONENT[dtype] if tied else 1.0)
    scale = store_up(first, dtype, spare)
    residual = scale / 2 if tied else store_up(f32(mean([abs(f32(u - scale)) for u in magnitudes])), dtype)
    for _ in range({None: 0, "least_squares": 1, "alternating": 3}[refine]):
        outer = [abs(w) for w in group if residual_code(w, scale, residual) in (0, 3)]
        inner = [abs(w) for w in group if residual_code(w, scale, residual) in (1, 2)]
        if tied and any(magnitudes):
            # the least of sum (u - c * a)^2, with c = 3/2 for outer and 1/2 for inner weights
            best = (1.5 * fsum(outer) + 0.5 * fsum(inner)) / (2.25 * len(outer) + 0.25 * len(inner))
            scale = store_up(f32(best), dtype, spare)
            residual = scale / 2
        elif not tied and outer and inner:
            # the least of sum (u - a1 -+ a2)^2: both levels are the means of their weights
            high, low = mean(outer), mean(inner)
            scale, residual = store_up(f32((high + low) / 2), dtype), store_up(f32((high - low) / 2), dtype)
    return scale, residual


def residual_group(group: Sequence[float], dtype: str, *, refine: str | None = None, tied: bool = False) -> Quantized:
    scale, residual = residual_scales(group, dtype, refine, tied)
    codes = [residual_code(weight, scale, residual) for weight in group]
    values = [residual_value(code, scale, residual) for code in codes]
    return Quantized(codes, values, scale, scale_residual=None if tied else residual)


# ----------------------------------------------------------------------------------------------------------- matrices


def quantize_matrix(rows: Rows, group_size: int | str, quantize_group) -> Quantized:
    """Cut a matrix into groups along its rows (or take it as one), quantize each, and put it together again."""
    width = len(rows[0])
    if group_size == "tensor":
        whole = quantize_group([weight for row in rows for weight in row])

        def fold(flat: list) -> list:
            return [flat[start : start + width] for start in range(0, len(flat), width)]

        params = [None if param is None else [[param]] for param in whole[2:]]
        return Quantized(fold(whole.codes), fold(whole.values), *params)
    size = width if group_size == -1 else group_size
    done = [[quantize_group(row[start : start + size]) for start in range(0, width, size)] for row in rows]
    codes = [[code for group in row for code in group.codes] for row in done]
    values = [[value for group in row for value in group.values] for row in done]
    params = [[[group[field] for group in row] for row in done] for field in (2, 3, 4, 5)]
    return Quantized(codes, values, *(None if param[0][0] is None else param for param in params))


# ------------------------------------------------------------------------------------------------------------ packing


def pack(codes: Sequence[int], bits: int) -> list[int]:
    """The row as one large integer, cut into signed 32-bit words from its low end."""
    stream = sum(code << (position * bits) for position, code in enumerate(codes))
    words = [(stream >> shift) & 0xFFFFFFFF for shift in range(0, len(codes) * bits, 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def unpack(words: Sequence[int], bits: int, count: int) -> list[int]:
    stream = sum((word % 2**32) << (32 * position) for position, word in enumerate(words))
    return [(stream >> (position * bits)) % 2**bits for position in range(count)]
