"""Confidence-aware KL divergence: seek the mode where the teacher is sure, cover the spread where it is not.

Reverse KL makes the student put its mass where the teacher's is highest; forward KL makes it cover everything that the
teacher might say. BitDistiller mixes them by the teacher's confidence `gamma`: its mean probability of the tokens that
actually follow, measured once before training. `gamma = 1` is reverse KL, `gamma = 0` is forward KL.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.losses.divergences import check_unit_interval, forward_kl, reverse_kl
from bitdistiller_peft.losses.masking import IGNORE_INDEX

GAMMA_ADVICE = "Use 0 for forward KL, 1 for reverse KL, or the teacher's mean confidence."


def cakld(student_logits: Tensor, teacher_logits: Tensor, gamma: float | Tensor) -> Tensor:
    """Mix both directions of KL: `gamma * reverse_kl + (1 - gamma) * forward_kl`.

    Args:
        student_logits: `[..., vocab]`, any floating dtype.
        teacher_logits: `[..., vocab]`; gradients flow into it too unless it is detached.
        gamma: the teacher's confidence in [0, 1]: one number, or one per position, `[...]`.

    Returns:
        `[...]` in nats, fp32 (fp64 if a side is).

    Raises:
        ConfigError: `gamma` lies outside [0, 1] or has another shape; the logits differ in shape.

    Source:
        Du et al., BitDistiller (ACL 2024, arXiv 2402.10631), eq. 5. The released code averages the teacher's largest
        probability, over all positions, over one batch too many, and so can exceed 1; here that is refused.
    """
    if isinstance(gamma, Tensor):
        _check_per_position(gamma, student_logits.shape[:-1])
    else:
        check_unit_interval("gamma", gamma, GAMMA_ADVICE)
    forward = forward_kl(student_logits, teacher_logits)
    reverse = reverse_kl(student_logits, teacher_logits)
    return gamma * reverse + (1 - gamma) * forward


def confidence(teacher_logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Give the teacher's probability of the token that actually follows.

    Args:
        teacher_logits: `[..., vocab]`, any floating dtype.
        labels: `[...]`, already aligned: the label at a position is the token that its logits predict.
        ignore_index: the label of positions that are no targets.

    Returns:
        `[...]` in [0, 1], fp32 at least; 0 where the label is `ignore_index`. Its mean over the targets is `gamma`.
    """
    logits = teacher_logits.to(torch.promote_types(teacher_logits.dtype, torch.float32))
    is_target = labels != ignore_index
    index = torch.where(is_target, labels, 0).unsqueeze(-1)
    log_probs = logits.gather(-1, index).squeeze(-1) - torch.logsumexp(logits, -1)
    return torch.where(is_target, log_probs.exp(), 0.0)


def _check_per_position(gamma: Tensor, positions: torch.Size) -> None:
    if gamma.shape not in (positions, torch.Size()):
        raise ConfigError(
            f"`gamma` must hold one number per position: got gamma={list(gamma.shape)}, positions={list(positions)}. "
            "Pass confidence(teacher_logits, labels), or one float."
        )
    outside = gamma[~((gamma >= 0) & (gamma <= 1))]
    if outside.numel():
        raise ConfigError(f"`gamma` must lie in [0, 1]: got gamma={outside.flatten()[0].item()!r}. {GAMMA_ADVICE}")
