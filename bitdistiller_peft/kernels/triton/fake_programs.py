"""Triton programs of fake quantization, forward and backward; imported on first use, as `programs` is.

The formulas are those of `bitdistiller_peft/quantizers`, operation for operation: divisions round correctly, and no
product is followed by a sum that could swallow its rounding, so values equal the reference's bit for bit.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _rounded(x):
    """Halves to even; numbers beyond 2**22 lie outside of every range of codes, rounded or not."""
    magic = 12582912.0
    return tl.where(tl.abs(x) < 4194304.0, (x + magic) - magic, x)


@triton.jit
def _clamped(code, top):
    code = tl.where(code < 0.0, 0.0, code)  # NaN stays
    return tl.where(code > top, top, code)


@triton.jit
def _divided(x, y):
    return tl.div_rn(x, tl.broadcast_to(y, x.shape))


@triton.jit
def _even(steps, zero, FAMILY: tl.constexpr):
    """Codes not yet clamped: integer zero points are added after rounding, others before."""
    if FAMILY == 0:
        return _rounded(steps) + zero
    return _rounded(steps + zero)


@triton.jit
def _nearest(x, levels, midpoints, LEVELS: tl.constexpr):
    level = tl.zeros_like(x) + tl.load(levels)
    for i in tl.static_range(LEVELS - 1):
        level = tl.where(x > tl.load(midpoints + i), tl.load(levels + i + 1), level)
    return level


@triton.jit
def _normalized(w, scale, second):
    above = tl.where(scale == 0.0, 1.0, scale)
    below = tl.where(second == 0.0, 1.0, second)
    return _divided(w, tl.where(w < 0.0, below, above))


@triton.jit
def _signs(w, scale, second):
    """The signs of scale and residual scale. Where the residual scale is the larger one, its sign is found first."""
    is_swapped = second > scale
    larger = tl.where(is_swapped, second, scale)
    high = tl.where(w >= 0.0, 1.0, -1.0)
    low = tl.where(w >= tl.where(w < 0.0, -larger, larger), 1.0, -1.0)
    return tl.where(is_swapped, low, high), tl.where(is_swapped, high, low)


@triton.jit
def _parameters(scale, second, run, mask, per_group, zero_point, FAMILY: tl.constexpr, HAS_SECOND: tl.constexpr):
    """Scale and second parameter of some runs, ``[R, 1]``."""
    group = run // per_group
    p = tl.load(scale + group, mask=mask, other=1.0)
    if HAS_SECOND:
        q = tl.load(second + group, mask=mask, other=1.0)
    elif FAMILY == 0:
        q = tl.zeros_like(p) + zero_point
    elif FAMILY == 1:
        q = p
    else:
        q = p * 0.5
    return p[:, None], q[:, None]


@triton.jit
def values(
    out, weight, scale, second, levels, midpoints, runs, size, per_group, max_code, zero_point,
    FAMILY: tl.constexpr, HAS_SECOND: tl.constexpr, LEVELS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the codes of some runs stand for."""
    run = tl.program_id(0) * R + tl.arange(0, R)
    p, q = _parameters(scale, second, run, run < runs, per_group, zero_point, FAMILY, HAS_SECOND)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = (run < runs)[:, None] & (column < size)[None, :]
        place = run.to(tl.int64)[:, None] * size + column[None, :]
        w = tl.load(weight + place, mask=mask, other=0.0)
        if (FAMILY == 0) | (FAMILY == 3):
            code = _clamped(_even(_divided(w, p), q, FAMILY), max_code)
            made = (code - q) * p
        elif FAMILY == 1:
            level = _nearest(_normalized(w, p, q), levels, midpoints, LEVELS)
            made = tl.where(level > 0.0, level, 0.0) * p + tl.where(level < 0.0, level, 0.0) * q
        else:
            first, other = _signs(w, p, q)
            made = first * p + other * q
        tl.store(out + place, made, mask=mask)


@triton.jit
def gradients(
    out, to_scale, to_second, weight, grad, scale, second, levels, midpoints, runs, size, per_group, max_code,
    zero_point, lowest, highest,
    FAMILY: tl.constexpr, HAS_SECOND: tl.constexpr, LEVELS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the weights of some runs, and the sums for their parameters."""
    run = tl.program_id(0) * R + tl.arange(0, R)
    p, q = _parameters(scale, second, run, run < runs, per_group, zero_point, FAMILY, HAS_SECOND)
    for_scale, for_second = tl.zeros((R, BLOCK), tl.float32), tl.zeros((R, BLOCK), tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = (run < runs)[:, None] & (column < size)[None, :]
        place = run.to(tl.int64)[:, None] * size + column[None, :]
        w = tl.load(weight + place, mask=mask, other=0.0)
        g = tl.load(grad + place, mask=mask, other=0.0)
        if (FAMILY == 0) | (FAMILY == 3):
            steps = _divided(w, p)
            code = _even(steps, q, FAMILY)
            inside = (code >= 0.0) & (code <= max_code)
            offset = _clamped(code, max_code) - q
            kept = tl.where(inside, g, 0.0)
            for_scale += g * tl.where(inside, offset - steps, offset)
            for_second += g - kept
        elif FAMILY == 1:
            x = _normalized(w, p, q)
            level = _nearest(x, levels, midpoints, LEVELS)
            inside = (x >= lowest) & (x <= highest)
            slope = g * tl.where(inside, level - x, level)
            kept = tl.where(inside, g, 0.0)
            if HAS_SECOND:
                for_scale += tl.where(w < 0.0, 0.0, slope)
                for_second += tl.where(w < 0.0, slope, 0.0)
            else:
                for_scale += slope
        else:
            first, other = _signs(w, p, q)
            kept = g
            for_scale += first * g
            for_second += other * g
        tl.store(out + place, kept, mask=mask)
    tl.store(to_scale + run, tl.sum(for_scale, 1), mask=run < runs)
    tl.store(to_second + run, tl.sum(for_second, 1), mask=run < runs)


@triton.jit
def ends(low, high, weight, runs, size, R: tl.constexpr, BLOCK: tl.constexpr):
    """Lowest and highest weight of some runs; NaN where one holds one."""
    run = tl.program_id(0) * R + tl.arange(0, R)
    least, most = tl.full((R, BLOCK), float("inf"), tl.float32), tl.full((R, BLOCK), float("-inf"), tl.float32)
    broken = tl.zeros((R, BLOCK), tl.int32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        mask = (run < runs)[:, None] & (column < size)[None, :]
        w = tl.load(weight + run.to(tl.int64)[:, None] * size + column[None, :], mask=mask, other=0.0)
        least = tl.where(mask & (w < least), w, least)
        most = tl.where(mask & (w > most), w, most)
        broken = broken | (w != w).to(tl.int32)
    is_broken = tl.max(broken, 1) > 0
    tl.store(low + run, tl.where(is_broken, float("nan"), tl.min(least, 1)), mask=run < runs)
    tl.store(high + run, tl.where(is_broken, float("nan"), tl.max(most, 1)), mask=run < runs)
