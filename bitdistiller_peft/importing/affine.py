"""Foreign integers on our affine grids: ``weight = scale * (code - zero_point)``, exactly or not at all."""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.errors import ForeignModelError
from bitdistiller_peft.importing.formats import ImportedWeight
from bitdistiller_peft.quantizers import QuantParams, QuantSpec

WIDTHS = (2, 3, 4, 8)
_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}


def affine_weight(codes: Tensor, scale: Tensor, zero_point: Tensor, *, bits: int, grid: str = "int") -> ImportedWeight:
    """Put integers on a grid.

    A negative scale turns the codes of its group round. A scale of zero, which stands for a group of zeros, becomes 1
    with all codes at the zero point. Where all zero points are in the middle, the grid is the symmetric one.

    Args:
        codes: integers ``0 .. 2**bits - 1``, ``[out, in]``.
        scale: ``[out, groups]``, fp16, bf16 or fp32.
        zero_point: integers ``[out, groups]``, in steps of the codes.
        bits: width of the codes.
        grid: ``"int"``, or ``"ternary"`` for codes up to 2 and zero points of 1.

    Raises:
        ForeignModelError: a zero point lies outside of the codes, or a scale is not finite.
    """
    top = 2 if grid == "ternary" else (1 << bits) - 1
    check_scales(scale)
    codes, zero_point = codes.to(torch.int16), zero_point.to(torch.int16)
    turned = scale < 0
    width = codes.shape[1] // scale.shape[1]
    zero_point = torch.where(turned, top - zero_point, zero_point)
    codes = torch.where(turned.repeat_interleave(width, 1), top - codes, codes)
    if int(zero_point.min()) < 0 or int(zero_point.max()) > top:
        raise ForeignModelError(
            f"every zero point must be one of the codes 0 .. {top}: got {int(zero_point.min())} to "
            f"{int(zero_point.max())}. No grid of this library holds that; start from a symmetric checkpoint."
        )
    empty = scale == 0
    codes = torch.where(empty.repeat_interleave(width, 1), zero_point.repeat_interleave(width, 1), codes)
    scale = torch.where(empty, torch.ones_like(scale), scale.abs())
    if grid == "int" and bool((zero_point == 1 << (bits - 1)).all()):
        grid = "int_sym"
    scale = storable(scale)
    spec = QuantSpec.create(grid, bits, group_size=width, scale_dtype=_DTYPES[scale.dtype])
    stored = zero_point.to(torch.uint8) if grid == "int" else None
    return ImportedWeight(spec, codes.to(torch.uint8), QuantParams(scale, stored))


def check_scales(scale: Tensor) -> None:
    """Refuse scales that are not finite.

    Raises:
        ForeignModelError: NaN or Inf.
    """
    if scale.dtype not in _DTYPES or not bool(torch.isfinite(scale).all()):
        raise ForeignModelError(
            f"scales must be finite and one of {sorted(_DTYPES.values())}: got {scale.dtype} with NaN or Inf, or of "
            "another dtype. The file is damaged; download it again."
        )


def storable(scale: Tensor) -> Tensor:
    """The same positive scales in a dtype that packing takes: fp32 where one is subnormal in its own."""
    return scale.float() if bool((scale < torch.finfo(scale.dtype).tiny).any()) else scale
