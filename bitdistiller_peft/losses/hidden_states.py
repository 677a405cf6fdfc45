"""How far a student's hidden states are from its teacher's, token by token, whatever their size.

States are divided by their root mean square first, as the norm that reads them does. Otherwise the few tokens with huge
activations, on which decoders rest their attention, would outweigh all others.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.losses.masking import IGNORE_INDEX

_EPS = 1e-6


def hidden_state_loss(student: Tensor, teacher: Tensor, labels: Tensor, *, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Mean squared difference over the width, summed over the tokens that have a label.

    For states without relation to each other it is 2 a token. Computed in fp32; the gradient reaches the student alone.

    Args:
        student: `[tokens, width]`.
        teacher: `[tokens, width]`, of the same layer.
        labels: `[tokens]`, already shifted; rows whose label is ignored are never read.
        ignore_index: the label of tokens that do not count.

    Returns:
        The sum, a scalar.

    Raises:
        ConfigError: the widths differ.
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise ConfigError(
            f"`hidden_weight` must be 0.0 for a teacher of another width: got {teacher.shape[-1]} for the teacher and "
            f"{student.shape[-1]} for the student."
        )
    chosen = labels != ignore_index
    width = (student.shape[-1],)
    with torch.autocast(student.device.type, enabled=False):
        ours = F.rms_norm(student[chosen].float(), width, eps=_EPS)
        theirs = F.rms_norm(teacher.detach()[chosen].float(), width, eps=_EPS)
        return (ours - theirs).square().mean(dim=-1).sum()
