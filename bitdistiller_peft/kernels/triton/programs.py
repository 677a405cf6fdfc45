"""The Triton programs. Imported on first use: `triton` is an extra, and needs a GPU or its interpreter.

All read the portable layout, so a packed weight is on the GPU once, in the bytes of its file. A tile of weights is made
in registers, in fp32, by the formula of `kernels.tables`, in which at most one operation rounds.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _unpack(words, rows, row_mask, start, row_words, BITS: tl.constexpr, BK: tl.constexpr):
    """Codes ``start .. start + BK`` of some rows, int32 ``[BN, BK]``; each word is loaded once."""
    BN: tl.constexpr = rows.shape[0]
    line = words + rows.to(tl.int64)[:, None] * row_words
    if BITS == 3:  # 32 codes in three words; code 21 lies across the second and the third
        block = start // 32 * 3 + 3 * tl.arange(0, BK // 32)
        first = _words(line, block, row_mask, row_words)
        second = _words(line, block + 1, row_mask, row_words)
        third = _words(line, block + 2, row_mask, row_words)
        shift = 3 * tl.arange(0, 32)
        low = (first | (second << 32))[:, :, None] >> tl.minimum(shift, 60)[None, None, :]
        high = (second | (third << 32))[:, :, None] >> tl.maximum(shift - 32, 0)[None, None, :]
        codes = tl.where((shift <= 60)[None, None, :], low, high) & 7
    else:
        per_word: tl.constexpr = 32 // BITS
        word = start // per_word + tl.arange(0, BK // per_word)
        codes = _words(line, word, row_mask, row_words)[:, :, None] >> (BITS * tl.arange(0, per_word))[None, None, :]
        codes = codes & ((1 << BITS) - 1)
    return tl.reshape(codes.to(tl.int32), (BN, BK))


@triton.jit
def _words(line, index, row_mask, row_words):
    """Words ``[BN, n]`` as unsigned numbers in int64; zero beyond the end of a row."""
    mask = row_mask[:, None] & (index < row_words)[None, :]
    return tl.load(line + index[None, :], mask=mask, other=0).to(tl.int64) & 0xFFFFFFFF


@triton.jit
def _group_of(start, group_size, groups, BK: tl.constexpr, GROUPS: tl.constexpr):
    """The groups whose parameters a tile needs: one per `BK // GROUPS` weights, or one per weight where GROUPS is 0."""
    if GROUPS == 0:
        return tl.minimum((start + tl.arange(0, BK)) // group_size, groups - 1)
    return tl.minimum(start // group_size + tl.arange(0, GROUPS), groups - 1)


@triton.jit
def _spread(values, BK: tl.constexpr, GROUPS: tl.constexpr):
    """One parameter per group as one per weight, ``[BN, BK]``."""
    if GROUPS == 0:
        return values
    BN: tl.constexpr = values.shape[0]
    size: tl.constexpr = BK // GROUPS
    return tl.reshape(tl.broadcast_to(values[:, :, None], (BN, GROUPS, size)), (BN, BK))


@triton.jit
def _zero_points(words, rows, row_mask, group, row_words, BITS: tl.constexpr):
    """Packed zero points of some groups, fp32 ``[BN, n]``."""
    line = words + rows.to(tl.int64)[:, None] * row_words
    bit = group * BITS
    word = bit // 32
    shift = (bit % 32)[None, :]
    codes = _words(line, word, row_mask, row_words) >> shift
    if BITS == 3:
        codes = codes | (_words(line, word + 1, row_mask, row_words) << (32 - shift))
    return (codes & ((1 << BITS) - 1)).to(tl.float32)


@triton.jit
def _tile(
    words, scale, second, a, b, rows, row_mask, start, row_words, groups, second_words, group_size, start_code,
    BITS: tl.constexpr, KIND: tl.constexpr, IS_SHARED: tl.constexpr, BK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Weights ``start .. start + BK`` of some rows, fp32 ``[BN, BK]``.

    KIND 0: integers around a fixed zero; 1: around one per group; 2: levels; 3: levels under two scales; 4: integers
    around a zero per group in quarter steps, the first of them at ``-start_code``.
    """
    codes = _unpack(words, rows, row_mask, start, row_words, BITS, BK)
    group = _group_of(start, group_size, groups, BK, GROUPS)
    own = rows * 0 if IS_SHARED else rows
    place = own.to(tl.int64)[:, None] * groups + group[None, :]
    p = _spread(tl.load(scale + place, mask=row_mask[:, None], other=0).to(tl.float32), BK, GROUPS)
    if KIND == 0:
        return (codes + start_code).to(tl.float32) * p
    if KIND == 1:
        q = _spread(_zero_points(second, own, row_mask, group, second_words, BITS), BK, GROUPS)
        return (codes.to(tl.float32) - q) * p
    if KIND == 4:
        q = _spread(_zero_points(second, own, row_mask, group, second_words, BITS), BK, GROUPS)
        return (codes.to(tl.float32) + start_code - 0.25 * q) * p
    if KIND == 2:
        return tl.load(a + codes) * p
    q = _spread(tl.load(second + place, mask=row_mask[:, None], other=0).to(tl.float32), BK, GROUPS)
    return tl.load(a + codes) * p + tl.load(b + codes) * q


@triton.jit
def dequantize(
    out, words, scale, second, a, b, num_rows, width, row_words, groups, second_words, group_size, start_code,
    BITS: tl.constexpr, KIND: tl.constexpr, IS_SHARED: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One tile of the dense weight ``[num_rows, width]``."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    start = tl.program_id(1) * BK
    row_mask = rows < num_rows
    weight = _tile(
        words, scale, second, a, b, rows, row_mask, start, row_words, groups, second_words, group_size, start_code,
        BITS, KIND, IS_SHARED, BK, GROUPS,
    )  # fmt: skip
    columns = start + tl.arange(0, BK)
    place = rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out + place, weight.to(out.dtype.element_ty), mask=row_mask[:, None] & (columns < width)[None, :])


@triton.jit
def multiply_few(
    out, inputs, words, scale, second, a, b,
    num_rows, width, row_words, groups, second_words, group_size, start_code, steps,
    BITS: tl.constexpr, KIND: tl.constexpr, IS_SHARED: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Some rows' products with one token over one part of the width: fp32 ``out[part, token, row]``, without a bias.

    Sums stay spread over the tile until the end, so the order of additions is the same in every run.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    token, part = tl.program_id(1), tl.program_id(2)
    row_mask = rows < num_rows
    total = tl.zeros((BN, BK), tl.float32)
    for step in range(steps):
        start = (part * steps + step) * BK
        columns = start + tl.arange(0, BK)
        x = tl.load(inputs + token.to(tl.int64) * width + columns, mask=columns < width, other=0).to(tl.float32)
        total += x[None, :] * _tile(
            words, scale, second, a, b, rows, row_mask, start, row_words, groups, second_words, group_size, start_code,
            BITS, KIND, IS_SHARED, BK, GROUPS,
        )  # fmt: skip
    place = (part * tl.num_programs(1) + token).to(tl.int64) * num_rows + rows
    tl.store(out + place, tl.sum(total, 1), mask=row_mask)


@triton.jit
def multiply_many(
    out, inputs, bias, words, scale, second, a, b,
    num_tokens, num_rows, width, row_words, groups, second_words, group_size, start_code, steps,
    BITS: tl.constexpr, KIND: tl.constexpr, IS_SHARED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A tile ``[BM tokens, BN rows]`` of the product. The weight is the first operand: it stays in registers."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    row_mask, token_mask = rows < num_rows, tokens < num_tokens
    total = tl.zeros((BN, BM), tl.float32)
    for step in range(steps):
        start = step * BK
        columns = start + tl.arange(0, BK)
        weight = _tile(
            words, scale, second, a, b, rows, row_mask, start, row_words, groups, second_words, group_size, start_code,
            BITS, KIND, IS_SHARED, BK, GROUPS,
        )  # fmt: skip
        place = tokens.to(tl.int64)[None, :] * width + columns[:, None]
        x = tl.load(inputs + place, mask=token_mask[None, :] & (columns < width)[:, None], other=0)
        weight = weight.to(x.dtype)  # rounded as a dense weight would be
        total = tl.dot(weight, x, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=row_mask, other=0).to(tl.float32)[:, None]
    place = tokens.to(tl.int64)[None, :] * num_rows + rows[:, None]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=row_mask[:, None] & token_mask[None, :])
