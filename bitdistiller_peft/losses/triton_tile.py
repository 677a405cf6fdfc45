"""One tile of tokens on a GPU: two Triton programs in place of some thirty passes over its logits."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bitdistiller_peft.losses.objective import Objective

PARTS = {"cakld", "forward_kl", "reverse_kl", "ce"}
DEVICES = ("cuda",)
"""Where the programs are used; tests add the CPU, for Triton's interpreter."""
_STATISTICS = 10
_BLOCK = 4096
_LEAST_CAPABILITY = (7, 0)


def fits(student_logits: Tensor, teacher_logits: Tensor | None, objective: Objective) -> bool:
    """Whether the programs know the objective, and can run where the logits are.

    Args:
        student_logits: `[tokens, vocab]`.
        teacher_logits: the same of the teacher, all of them known; None where there is none or only a part is.
        objective: what to minimize.
    """
    sides = (student_logits, teacher_logits)
    return (
        objective.temperature == 1
        and set(objective.terms) <= PARTS
        and all(side is not None and side.dtype == torch.float32 and side.is_contiguous() for side in sides)
        and student_logits.device.type in DEVICES
        and _is_usable(student_logits.device)
    )


def score(
    student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective, *, with_gradient: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Measure a tile; see `tile.score_tile`.

    Args:
        student: logits `[tokens, vocab]`.
        teacher: the same of the teacher.
        labels: `[tokens]`.
        objective: one that `fits`.
        with_gradient: whether the student learns from this pass.
    """
    programs, (rows, vocab) = _programs(), student.shape
    stats = torch.empty(rows, _STATISTICS, device=student.device)
    block = min(_BLOCK, programs.triton.next_power_of_2(vocab))
    programs.measure[(rows,)](student, teacher, stats, vocab, STATS=_STATISTICS, BLOCK=block)
    top_s, top_t, log_zs, log_zt, under_s, under_t, drift, entropy_s, entropy_t, agreement = stats.unbind(-1)
    at = labels.unsqueeze(-1)
    values = {
        "cross_entropy": log_zs - (student.gather(-1, at).squeeze(-1) - top_s),
        "student_entropy": entropy_s,
        "teacher_entropy": entropy_t,
        "confidence": (teacher.gather(-1, at).squeeze(-1) - top_t - log_zt).exp(),
        "agreement": agreement,
        "forward_kl": drift - under_t,
        "reverse_kl": under_s - drift,
    }
    weights = _weights(values, objective)
    measured = torch.stack([values["forward_kl"], values["reverse_kl"], values["cross_entropy"]], -1)
    # measured only where the weight is 0: an infinite statistic must not turn into NaN
    values["loss"] = torch.where(weights == 0, 0.0, weights * measured).sum(-1)
    if not with_gradient:
        return values, None
    grad = torch.empty_like(student)
    programs.slope[(rows,)](student, teacher, stats, labels, weights, grad, vocab, STATS=_STATISTICS, BLOCK=block)
    return values, grad


def _weights(values: dict[str, Tensor], objective: Objective) -> Tensor:
    """The weights of forward KL, reverse KL and cross-entropy, `[tokens, 3]`."""
    coefficients, factor = objective.coefficients(values["confidence"]), objective.divergence_factor
    rows = torch.zeros(len(values["confidence"]), 3, device=values["confidence"].device)
    for column, part in enumerate(("forward_kl", "reverse_kl")):
        rows[:, column] = factor * coefficients.get(part, 0.0)
    rows[:, 2] = objective.terms.get("ce", 0.0)
    return rows


@lru_cache(maxsize=8)
def _is_usable(device: torch.device) -> bool:
    if _programs() is None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


@lru_cache(maxsize=1)
def _programs() -> Any:
    """The module of the programs; `None` where Triton is not installed."""
    try:
        from bitdistiller_peft.losses import triton_programs
    except ImportError:
        return None
    return triton_programs
