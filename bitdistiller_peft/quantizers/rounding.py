"""How a scale computed in fp32 becomes the one that is stored, and when it is refused."""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.errors import ScaleRangeError, WeightError


def round_scale_up(scale: Tensor, dtype: torch.dtype, *, spare_bits: int = 0, furthest: float = 1.0) -> Tensor:
    """Store a non-negative fp32 scale in `dtype`, never smaller than it was.

    Rounding up keeps the largest weight of the group inside the range of the codes, so that the half-a-step bound
    holds with the stored scale.

    Args:
        scale: fp32, any shape, ``>= 0`` or NaN.
        dtype: fp16, bf16 or fp32.
        spare_bits: bits at the end of the significand to keep zero.
        furthest: the most scales that a value is from zero; where that is no fp32 number, the scale is infinite, and
            so refused.
    """
    scale = torch.where(scale == 0, 0.0, scale)  # an absent sign's may come as -0
    stored = scale.to(dtype)
    if dtype != torch.float32:
        # the next number above a finite non-negative float is the next integer of its bit pattern
        above = (stored.view(torch.int16) + 1).view(dtype)
        stored = torch.where(stored.float() < scale, above, stored)
    stored = _with_spare_bits(stored, spare_bits, (1 << spare_bits) - 1)
    return torch.where(torch.isinf(stored.float() * furthest), torch.inf, stored)


def round_scale_nearest(
    scale: Tensor, dtype: torch.dtype, *, spare_bits: int = 0, floor: float | None = None
) -> Tensor:
    """Store a learned fp32 scale in `dtype`, to nearest; the smallest normal number is its floor.

    The floor keeps a scale that an optimizer step has pushed below zero usable, and its gradient alive.

    Args:
        scale: fp32, any shape.
        dtype: fp16, bf16 or fp32.
        spare_bits: bits at the end of the significand to keep zero; a second rounding, half-way values up.
        floor: another floor.
    """
    lowest = torch.finfo(dtype).tiny if floor is None else floor
    stored = scale.detach().float().clamp(min=lowest).to(dtype)
    return _with_spare_bits(stored, spare_bits, (1 << spare_bits) >> 1)


def _with_spare_bits(stored: Tensor, spare_bits: int, addend: int) -> Tensor:
    """Clear the last bits of non-negative floats after adding to their bit patterns; NaN and infinity stay."""
    if spare_bits == 0:
        return stored
    pattern = stored.view(torch.int32 if stored.dtype == torch.float32 else torch.int16)
    rounded = ((pattern + addend) & -(1 << spare_bits)).view(stored.dtype)
    return torch.where(torch.isfinite(stored), rounded, stored)


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


def check_residual_scale(scale: Tensor) -> None:
    """Refuse scales of a residual that are not finite or negative.

    Zero is a scale like others: nothing may be left. So is a subnormal one. Its spacing is no coarser than that of the
    first scale, to which it is added, so that storing it costs no more than storing the first one does.

    Args:
        scale: as stored, in fp16, bf16 or fp32.

    Raises:
        WeightError: NaN, which only a NaN or infinite weight can cause.
        ScaleRangeError: infinite or negative.
    """
    check_scale(torch.where(scale > 0, scale.clamp(min=torch.finfo(scale.dtype).tiny), scale), allow_zero=True)
