"""How far one next-token distribution is from another: one number per position, in nats.

Three habits keep these finite and exact where the textbook line `sum(p * (log_p - log_q))` is not:

- Nothing takes the logarithm of a probability. The log ratio is a difference of logits, minus a difference of log
  normalizers, so a gap of 150 stays 150 and does not become `log(0)`. (`F.kl_div` against probabilities has NaN
  gradients from a gap of about 104 on in fp32; the published BitDistiller code calls it so.)
- Both distributions sum to one, so `q - p` may be added under the sum. It cancels, to first order, whatever rounding
  the normalizers carry, and a student close to its teacher still has a KL with correct digits.
- An outcome without probability counts nothing: `0 * log(0 / q) = 0`, also where a padded vocabulary holds `-inf` on
  both sides. One-sided `-inf` gives the infinity that the definition asks for.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from bitdistiller_peft.errors import ConfigError


class Comparison(NamedTuple):
    """Two distributions over the same vocabulary, and how they differ; all `[..., vocab]`."""

    student_probs: Tensor
    teacher_probs: Tensor
    log_ratio: Tensor
    """log student - log teacher; 0 where both are impossible."""
    drift: Tensor
    """student - teacher, with correct digits also where they nearly agree."""


def check_unit_interval(name: str, value: object, advice: str) -> None:
    """Refuse a number outside [0, 1].

    Args:
        name: the parameter, as its caller wrote it.
        value: what was given.
        advice: what to do instead, one sentence.

    Raises:
        ConfigError: not a number, NaN, or outside.
    """
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= float(value) <= 1:
        raise ConfigError(f"`{name}` must lie in [0, 1]: got {name}={value!r}. {advice}")


def compare(student_logits: Tensor, teacher_logits: Tensor) -> Comparison:
    """Turn two sets of logits into what every divergence needs.

    Args:
        student_logits: `[..., vocab]`, any floating dtype.
        teacher_logits: `[..., vocab]`, same shape and device.

    Returns:
        Probabilities and log ratio in fp32, or in fp64 if a side is fp64.

    Raises:
        ConfigError: the shapes differ.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ConfigError(
            "`teacher_logits` must have the shape of `student_logits`: got "
            f"teacher_logits={list(teacher_logits.shape)}, student_logits={list(student_logits.shape)}. "
            "Cut both to the vocabulary that they share."
        )
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
    # Each side relative to its largest logit, which drops out of every result and of every gradient.
    student_top, teacher_top = (side.detach().amax(-1, keepdim=True) for side in (student, teacher))
    student_rest, teacher_rest = student - student_top, teacher - teacher_top
    student_log_z, teacher_log_z = (torch.logsumexp(rest, -1, keepdim=True) for rest in (student_rest, teacher_rest))
    # -inf - (-inf) would be NaN. Only that case is masked: equal finite logits must keep their gradient.
    is_padding = torch.isneginf(student) & torch.isneginf(teacher)
    gap = torch.where(is_padding, 0.0, student - teacher) - (student_top - teacher_top)
    log_ratio = gap - (student_log_z - teacher_log_z)
    student_probs, teacher_probs = (student_rest - student_log_z).exp(), (teacher_rest - teacher_log_z).exp()
    near = teacher_probs * torch.expm1(log_ratio.clamp(max=1))
    drift = torch.where(log_ratio > 1, student_probs - teacher_probs, near)
    return Comparison(student_probs, teacher_probs, log_ratio, drift)


def expected(probs: Tensor, values: Tensor) -> Tensor:
    """Average values `[..., vocab]` under probabilities; what has no probability counts nothing, infinite or not."""
    return (probs * torch.where(probs == 0, 0.0, values)).sum(-1)


def excess_over_mixture(log_ratio: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Log ratio of each side to the mixture `m = (1 - beta) * student + beta * teacher`.

    Args:
        log_ratio: log student - log teacher, `[..., vocab]`.
        beta: weight of the teacher, strictly between 0 and 1.

    Returns:
        `log student - log m` and `log teacher - log m`, finite wherever the side itself has probability.
    """
    return -_log_mix(-log_ratio, beta), -_log_mix(log_ratio, 1 - beta)


def _log_mix(log_ratio: Tensor, share: float) -> Tensor:
    """Compute `log((1 - share) + share * exp(log_ratio))`, with correct digits near 0."""
    near = torch.log1p(share * torch.expm1(log_ratio.clamp(-1, 1)))
    far = torch.logaddexp(log_ratio.new_tensor(math.log1p(-share)), log_ratio + math.log(share))
    return torch.where(log_ratio.abs() < 1, near, far)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher ‖ student): large where the student will not say what the teacher would.

    Args:
        student_logits: `[..., vocab]`, any floating dtype.
        teacher_logits: `[..., vocab]`; gradients flow into it too unless it is detached.

    Returns:
        `[...]` in nats, fp32 (fp64 if a side is). Finite for any finite logits, and for `-inf` on both sides at once.

    Raises:
        ConfigError: the shapes differ.
    """
    both = compare(student_logits, teacher_logits)
    return both.drift.sum(-1) - expected(both.teacher_probs, both.log_ratio)


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(student ‖ teacher): large where the student says what the teacher would not.

    Args:
        student_logits: `[..., vocab]`, any floating dtype.
        teacher_logits: `[..., vocab]`; gradients flow into it too unless it is detached.

    Returns:
        `[...]` in nats, fp32 (fp64 if a side is). Finite for any finite logits, and for `-inf` on both sides at once.

    Raises:
        ConfigError: the shapes differ.
    """
    return forward_kl(teacher_logits, student_logits)


def jensen_shannon(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5) -> Tensor:
    """Generalized Jensen-Shannon divergence: both sides against their mixture, so never above log 2.

    `beta * KL(teacher ‖ m) + (1 - beta) * KL(student ‖ m)` with `m = (1 - beta) * student + beta * teacher`.

    Args:
        student_logits: `[..., vocab]`, any floating dtype.
        teacher_logits: `[..., vocab]`; gradients flow into it too unless it is detached.
        beta: weight of the teacher in the mixture. As in TRL, 0 is read as `forward_kl` and 1 as `reverse_kl`.

    Returns:
        `[...]` in nats, fp32 (fp64 if a side is).

    Raises:
        ConfigError: the shapes differ, or `beta` lies outside [0, 1].

    Source:
        Agarwal et al., On-Policy Distillation of Language Models (arXiv 2306.13649), eq. 1; the two ends, where that
        formula is 0, are TRL's convention.
    """
    check_unit_interval("beta", beta, "Use beta=0.5 for the symmetric divergence.")
    if beta == 0:
        return forward_kl(student_logits, teacher_logits)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits)
    both = compare(student_logits, teacher_logits)
    student_excess, teacher_excess = excess_over_mixture(both.log_ratio, beta)
    teacher_term = expected(both.teacher_probs, teacher_excess)
    return beta * teacher_term + (1 - beta) * expected(both.student_probs, student_excess)
