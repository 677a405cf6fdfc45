"""The Triton programs of the loss, one row of logits each. Imported on first use: `triton` is an extra.

They follow `divergences.compare`: each side is taken relative to its largest logit, the log ratio is a difference of
logits, and the drift keeps its digits where both sides nearly agree. Sums are kept lane by lane and added at the end.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _drift(student, teacher, ratio):
    """``student - teacher`` as ``teacher * expm1(ratio)`` where they are close; Taylor's series below one half."""
    r = tl.minimum(ratio, 1.0)
    small = tl.minimum(tl.maximum(r, -0.5), 0.5)
    series = 1.0 + small / 12
    for i in tl.static_range(10):
        series = 1.0 + small / (11 - i) * series
    near = tl.where(tl.abs(r) < 0.5, small * series, tl.exp(r) - 1.0)
    return tl.where(ratio > 1, student - teacher, teacher * near)


@triton.jit
def _sides(s, t, top_s, top_t, log_zs, log_zt):
    """Both probabilities and the log ratio; what is impossible on both sides has a ratio of 0."""
    never = float("-inf")
    both = (s == never) & (t == never)
    gap = tl.where(both, 0.0, s) - tl.where(both, 0.0, t) - (top_s - top_t)
    return tl.exp(s - top_s - log_zs), tl.exp(t - top_t - log_zt), gap - (log_zs - log_zt)


@triton.jit
def measure(student, teacher, out, vocab, STATS: tl.constexpr, BLOCK: tl.constexpr):
    """Per row: both tops and log normalizers, E_s[ratio], E_t[ratio], sum of drift, both entropies, both argmaxes."""
    row = tl.program_id(0).to(tl.int64)
    student += row * vocab
    teacher += row * vocab
    lanes = tl.arange(0, BLOCK)
    never = float("-inf")
    best_s = tl.full((BLOCK,), never, tl.float32)
    best_t = tl.full((BLOCK,), never, tl.float32)
    for start in range(0, vocab, BLOCK):
        mask = start + lanes < vocab
        best_s = tl.maximum(best_s, tl.load(student + start + lanes, mask=mask, other=never))
        best_t = tl.maximum(best_t, tl.load(teacher + start + lanes, mask=mask, other=never))
    top_s, top_t = tl.max(best_s, axis=0), tl.max(best_t, axis=0)
    sum_s = tl.zeros((BLOCK,), tl.float32)
    sum_t = tl.zeros((BLOCK,), tl.float32)
    first_s = tl.full((BLOCK,), 2147483647, tl.int32)
    first_t = tl.full((BLOCK,), 2147483647, tl.int32)
    for start in range(0, vocab, BLOCK):
        place = start + lanes
        mask = place < vocab
        s = tl.load(student + place, mask=mask, other=never)
        t = tl.load(teacher + place, mask=mask, other=never)
        sum_s += tl.exp(s - top_s)
        sum_t += tl.exp(t - top_t)
        first_s = tl.minimum(first_s, tl.where(mask & (s == top_s), place, 2147483647))
        first_t = tl.minimum(first_t, tl.where(mask & (t == top_t), place, 2147483647))
    log_zs, log_zt = tl.log(tl.sum(sum_s, axis=0)), tl.log(tl.sum(sum_t, axis=0))
    under_s = tl.zeros((BLOCK,), tl.float32)
    under_t = tl.zeros((BLOCK,), tl.float32)
    drifts = tl.zeros((BLOCK,), tl.float32)
    entropy_s = tl.zeros((BLOCK,), tl.float32)
    entropy_t = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        mask = start + lanes < vocab
        s = tl.load(student + start + lanes, mask=mask, other=never)
        t = tl.load(teacher + start + lanes, mask=mask, other=never)
        p, q, ratio = _sides(s, t, top_s, top_t, log_zs, log_zt)
        under_s += p * tl.where(p == 0, 0.0, ratio)
        under_t += q * tl.where(q == 0, 0.0, ratio)
        drifts += _drift(p, q, ratio)
        entropy_s -= p * tl.where(p == 0, 0.0, s - top_s - log_zs)
        entropy_t -= q * tl.where(q == 0, 0.0, t - top_t - log_zt)
    out += row * STATS
    tl.store(out + 0, top_s)
    tl.store(out + 1, top_t)
    tl.store(out + 2, log_zs)
    tl.store(out + 3, log_zt)
    tl.store(out + 4, tl.sum(under_s, axis=0))
    tl.store(out + 5, tl.sum(under_t, axis=0))
    tl.store(out + 6, tl.sum(drifts, axis=0))
    tl.store(out + 7, tl.sum(entropy_s, axis=0))
    tl.store(out + 8, tl.sum(entropy_t, axis=0))
    tl.store(out + 9, (tl.min(first_s, axis=0) == tl.min(first_t, axis=0)).to(tl.float32))


@triton.jit
def slope(
    student, teacher, stats, labels, weights, out, vocab, STATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of the weighted parts: ``weights`` has those of forward KL, reverse KL and cross-entropy, by row."""
    row = tl.program_id(0).to(tl.int64)
    student += row * vocab
    teacher += row * vocab
    out += row * vocab
    stats += row * STATS
    top_s, top_t = tl.load(stats + 0), tl.load(stats + 1)
    log_zs, log_zt, mean = tl.load(stats + 2), tl.load(stats + 3), tl.load(stats + 4)
    forward, reverse, entropy = (
        tl.load(weights + row * 3),
        tl.load(weights + row * 3 + 1),
        tl.load(weights + row * 3 + 2),
    )
    label = tl.load(labels + row)
    lanes = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        place = start + lanes
        mask = place < vocab
        s = tl.load(student + place, mask=mask, other=float("-inf"))
        t = tl.load(teacher + place, mask=mask, other=float("-inf"))
        p, q, ratio = _sides(s, t, top_s, top_t, log_zs, log_zt)
        pulled = entropy * (p - tl.where(place == label, 1.0, 0.0))
        pulled += forward * tl.where(forward == 0, 0.0, _drift(p, q, ratio))
        pulled += reverse * p * tl.where(reverse == 0, 0.0, tl.where(p == 0, 0.0, ratio - mean))
        tl.store(out + place, pulled, mask=mask)
