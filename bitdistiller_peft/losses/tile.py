"""One tile of tokens: every statistic, and the gradient of the loss with respect to the student's logits.

The gradients are written out, so that nothing is recorded. With `s` and `t` the two distributions at the objective's
temperature, `r = log s - log t`, `e = log s - log m`, and `u` the student's logits divided by the temperature:

    forward_kl   d/du = s - t
    reverse_kl   d/du = s * (r - sum(s * r))
    jsd          d/du = (1 - beta) * s * (e - sum(s * e))
    ce           d/dz = s_1 - onehot(label)         z, s_1: the student's logits and probabilities at temperature 1

A divergence that an outsider registered is differentiated by autograd, on this tile alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.losses import triton_tile
from bitdistiller_peft.losses.divergences import Comparison, compare, excess_over_mixture, expected
from bitdistiller_peft.losses.objective import Objective
from bitdistiller_peft.losses.registry import get_divergence
from bitdistiller_peft.losses.sparse import SparseTeacher

_STUDENT_STATISTICS = ("loss", "cross_entropy", "student_entropy")
_PAIR_STATISTICS = ("teacher_entropy", "confidence", "agreement", "forward_kl", "reverse_kl")

_CPU_STRIP_ELEMENTS = 1 << 19
_STRIP_ELEMENTS = 1 << 24
"""Logits that are measured at once: 2 MiB in fp32 on a CPU, whose caches reward it; 64 MiB where launches cost more."""

STATISTICS = (*_STUDENT_STATISTICS, *_PAIR_STATISTICS)
"""What is measured whatever the objective; its other parts come after these."""

Slope = Callable[[], Tensor]


class Tile(NamedTuple):
    """What is known about a few tokens; logits are scaled and capped, at temperature 1, in fp32 or fp64."""

    student_logits: Tensor
    """`[tokens, vocab]`"""
    teacher_logits: Tensor | None
    """`[tokens, vocab]`"""
    labels: Tensor
    """`[tokens]`, in `0 .. vocab - 1`"""
    sparse: SparseTeacher | None = None
    """What is really known of the teacher, where `teacher_logits` were filled up from it"""


def statistic_names(objective: Objective, *, has_teacher: bool) -> tuple[str, ...]:
    """List what `score_tile` measures."""
    if not has_teacher:
        return _STUDENT_STATISTICS
    return (*STATISTICS, *(part for part in objective.terms if part not in ("cakld", "ce", *STATISTICS)))


def strips(tile: Tile) -> Iterator[Tile]:
    """Cut a tile into views small enough that a dozen temporaries of their size cost nothing, or stay in the cache."""
    elements = _CPU_STRIP_ELEMENTS if tile.student_logits.device.type == "cpu" else _STRIP_ELEMENTS
    step = max(1, elements // tile.student_logits.shape[-1])
    for start in range(0, len(tile.labels), step):
        rows = slice(start, start + step)
        teacher = None if tile.teacher_logits is None else tile.teacher_logits[rows]
        sparse = None if tile.sparse is None else tile.sparse[rows]
        yield Tile(tile.student_logits[rows], teacher, tile.labels[rows], sparse)


def score_tile(tile: Tile, objective: Objective, *, with_gradient: bool) -> tuple[dict[str, Tensor], Tensor | None]:
    """Measure one tile.

    Args:
        tile: logits and labels.
        objective: what to minimize.
        with_gradient: whether the student learns from this pass.

    Returns:
        Statistic to value per token, `[tokens]`, and the gradient of the summed loss, `[tokens, vocab]`, if asked for.
    """
    student, teacher = tile.student_logits, tile.teacher_logits
    if teacher is not None and tile.sparse is None and triton_tile.fits(student, teacher, objective):
        return triton_tile.score(student, teacher, tile.labels, objective, with_gradient=with_gradient)
    pair = None if teacher is None else _warm(student, teacher, objective)
    is_plain = pair is not None and objective.temperature == 1
    probs = pair.both.student_probs if pair is not None and is_plain else tile.student_logits.softmax(-1)
    values = {
        "cross_entropy": F.cross_entropy(tile.student_logits, tile.labels, reduction="none"),
        "student_entropy": torch.special.entr(probs).sum(-1),
    }
    ce_weight = objective.terms.get("ce", 0.0)
    values["loss"] = ce_weight * values["cross_entropy"]
    grad = _cross_entropy_gradient(probs, tile.labels, ce_weight) if with_gradient else None
    if tile.teacher_logits is not None and pair is not None:
        probs = pair.both.teacher_probs if is_plain else tile.teacher_logits.softmax(-1)
        values |= _teacher_statistics(tile, tile.teacher_logits, probs)
        del probs
        _add_divergences(values, grad, pair, objective)
    return values, grad


class _Pair(NamedTuple):
    """Both sides at the objective's temperature."""

    student_logits: Tensor
    teacher_logits: Tensor
    both: Comparison


def _warm(student: Tensor, teacher: Tensor, objective: Objective) -> _Pair:
    if objective.temperature != 1:
        student, teacher = student / objective.temperature, teacher / objective.temperature
    return _Pair(student, teacher, compare(student, teacher))


def _cross_entropy_gradient(probs: Tensor, labels: Tensor, weight: float) -> Tensor:
    if weight == 0:
        return torch.zeros_like(probs)
    grad = probs * weight
    return grad.scatter_add_(-1, labels.unsqueeze(-1), grad.new_full((len(grad), 1), -weight))


def _teacher_statistics(tile: Tile, teacher_logits: Tensor, probs: Tensor) -> dict[str, Tensor]:
    top = teacher_logits.argmax(-1) if tile.sparse is None else tile.sparse.tokens[..., 0].long()
    is_same = tile.student_logits.argmax(-1) == top
    return {
        "teacher_entropy": torch.special.entr(probs).sum(-1) if tile.sparse is None else tile.sparse.entropy(),
        "confidence": probs.gather(-1, tile.labels.unsqueeze(-1)).squeeze(-1),
        "agreement": is_same.to(probs.dtype),
    }


def _add_divergences(values: dict[str, Tensor], grad: Tensor | None, pair: _Pair, objective: Objective) -> None:
    """Add every divergence to `values`, and those with a weight to the loss and to the gradient, in place."""
    coefficients = objective.coefficients(values["confidence"])
    factor = objective.divergence_factor
    for part in dict.fromkeys(("forward_kl", "reverse_kl", *coefficients)):
        values[part], slope = _divergence(part, pair, objective)
        weight = coefficients.get(part, 0.0)
        if not isinstance(weight, Tensor) and weight == 0:
            continue  # measured only; a weight of 0 must not turn an infinite statistic into NaN
        values["loss"] = values["loss"] + factor * weight * values[part]
        if grad is not None:
            share = factor / objective.temperature * weight
            grad += slope() * (share.unsqueeze(-1) if isinstance(share, Tensor) else share)


def _divergence(part: str, pair: _Pair, objective: Objective) -> tuple[Tensor, Slope]:
    """Value per token and, only if called for, its gradient with respect to the student's warm logits."""
    match part:
        case "forward_kl":
            return _forward_kl(pair.both)
        case "reverse_kl":
            return _reverse_kl(pair.both)
        case "jsd":
            return _jensen_shannon(pair.both, objective.jsd_beta)
    return _by_autograd(part, pair)


def _forward_kl(both: Comparison) -> tuple[Tensor, Slope]:
    return both.drift.sum(-1) - expected(both.teacher_probs, both.log_ratio), lambda: both.drift


def _reverse_kl(both: Comparison) -> tuple[Tensor, Slope]:
    mean = expected(both.student_probs, both.log_ratio)
    return mean - both.drift.sum(-1), lambda: _away_from_mean(both.student_probs, both.log_ratio, mean)


def _jensen_shannon(both: Comparison, beta: float) -> tuple[Tensor, Slope]:
    if beta == 0:
        return _forward_kl(both)
    if beta == 1:
        return _reverse_kl(both)
    student_excess, teacher_excess = excess_over_mixture(both.log_ratio, beta)
    student_term = expected(both.student_probs, student_excess)
    value = beta * expected(both.teacher_probs, teacher_excess) + (1 - beta) * student_term
    return value, lambda: _away_from_mean(both.student_probs, student_excess, student_term).mul_(1 - beta)


def _away_from_mean(probs: Tensor, log_ratio: Tensor, mean: Tensor) -> Tensor:
    # The mean must be the plain one, without the drift: only then does every row of the gradient sum to zero.
    return torch.where(probs == 0, 0.0, log_ratio).sub_(mean.unsqueeze(-1)).mul_(probs)


def _by_autograd(part: str, pair: _Pair) -> tuple[Tensor, Slope]:
    student = pair.student_logits.detach().requires_grad_()
    with torch.enable_grad():
        value = get_divergence(part)(student, pair.teacher_logits)
    if value.shape != student.shape[:-1]:
        raise ConfigError(
            f"A divergence must return one number per token: got {list(value.shape)} from {part!r} "
            f"for {len(student)} tokens. Sum it over the last dimension only."
        )
    return value.detach(), lambda: torch.autograd.grad(value, student, torch.ones_like(value))[0]
