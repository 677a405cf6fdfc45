"""What the integer formats share: zero points of every affine grid, exact casts, and reasons to refuse."""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.export.source import PackedWeight
from bitdistiller_peft.grids import AffineGrid, CodebookGrid, Grid


def fixed_zero_point(grid: Grid) -> int | None:
    """The zero point that all groups share, or `None` where each group has its own or the grid is not affine.

    A symmetric codebook of consecutive integers, such as the ternary one, is affine too.
    """
    if isinstance(grid, AffineGrid):
        return grid.fixed_zero_point
    if isinstance(grid, CodebookGrid) and grid.is_symmetric:
        steps = [int(level) for level in grid.levels]
        if list(grid.levels) == steps and steps == list(range(steps[0], steps[-1] + 1)):
            return -steps[0]
    return None


def is_affine(grid: Grid) -> bool:
    """Whether ``weight = scale * (code - zero_point)`` with one scale and an integer zero point per group."""
    return fixed_zero_point(grid) is not None or (isinstance(grid, AffineGrid) and grid.has_zero_point)


def zero_points(weight: PackedWeight) -> Tensor:
    """Zero points of an affine weight, int16 ``[out, groups]``."""
    fixed = fixed_zero_point(weight.spec.grid)
    shape = weight.row_scale.shape
    if fixed is not None:
        return torch.full(shape, fixed, dtype=torch.int16)
    if weight.params.zero_point is None:
        raise TypeError("an asymmetric grid needs zero points")
    return weight.params.zero_point.to(torch.int16).expand(shape)


def refuse_not_affine(weight: PackedWeight) -> str | None:
    """The reason why an integer format cannot hold a grid at all."""
    grid = weight.spec.grid
    if is_affine(grid):
        return None
    return f"grid {grid.name!r} is not scale * (code - zero_point) with one scale per group"


def cast_exactly(values: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The same numbers in another dtype, or `None` if one of them would change or lose precision as a subnormal."""
    cast = values.to(dtype)
    return cast if torch.equal(cast.to(torch.float64), values.to(torch.float64)) else None


def refuse_scales(weight: PackedWeight, dtype: torch.dtype) -> str | None:
    """The reason why a format that stores its scales in `dtype` cannot hold a weight."""
    if cast_exactly(weight.params.scale, dtype) is not None:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"a {weight.spec.scale_dtype_name} scale is no {name} number. Train with scale_dtype={name!r}"


def spread(values: Tensor, width: int, in_features: int) -> Tensor:
    """Repeat per-group values ``[out, groups]`` for groups of another, smaller, width."""
    return values.repeat_interleave((in_features // values.shape[1]) // width, dim=1)
