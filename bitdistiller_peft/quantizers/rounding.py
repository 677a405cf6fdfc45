"""How a scale computed in fp32 becomes the one that is stored, and when it is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.errors import ScaleRangeError, WeightError


def round_scale_up(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Store a non-negative fp32 scale in `dtype`, never smaller than it was.

    Rounding up keeps the largest weight of the group inside the range of the codes, so that the half-a-step bound
    holds with the stored scale.

    Args:
        scale: fp32, any shape, ``>= 0`` or NaN.
        dtype: fp16, bf16 or fp32.
    """
    scale = torch.where(scale == 0, 0.0, scale)  # an absent sign's may come as -0
    stored = scale.to(dtype)
    if dtype == torch.float32:
        return stored
    # the next number above a finite non-negative float is the next integer of its bit pattern
    above = (stored.view(torch.int16) + 1).view(dtype)
    return torch.where(stored.float() < scale, above, stored)


def round_scale_nearest(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Store a learned fp32 scale in `dtype`, to nearest; the smallest normal number is its floor.

    The floor keeps a scale that an optimizer step has pushed below zero usable, and its gradient alive.
    """
    return scale.detach().float().clamp(min=torch.finfo(dtype).tiny).to(dtype)


def check_scale(scale: Tensor, *, allow_zero: bool = False) -> None:
    """Refuse scales that cannot be stored faithfully.

    Args:
        scale: as stored, in fp16, bf16 or fp32.
        allow_zero: a zero means that the group has no weight of this sign.

    Raises:
        WeightError: NaN, which only a NaN or infinite weight can cause.
        ScaleRangeError: infinite, negative or subnormal in its dtype.
    """
    values = scale.detach().float()
    if values.isnan().any():
        raise WeightError("the weight must be finite: got NaN or Inf in it. Load an undamaged checkpoint.")
    info = torch.finfo(scale.dtype)
    name = str(scale.dtype).removeprefix("torch.")
    too_small = (values < info.tiny) & ~((values == 0) & allow_zero)
    if bool(torch.isinf(values).any()):
        raise ScaleRangeError(
            f"the scale must be at most {info.max:.4g} to be stored as {name}: got an overflow. "
            'Use scale_dtype="float32" or "bfloat16".'
        )
    if bool(too_small.any()):
        raise ScaleRangeError(
            f"the scale must be at least {info.tiny:.4g} to be stored as {name} without loss: got "
            f'{float(values[too_small].max()):.4g}. Use scale_dtype="float32".'
        )
