"""The complete description of how one weight is quantized, and the tensors that go with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.grids import AffineGrid, Grid, ResidualGrid, get_grid
from bitdistiller_peft.quantizers.grouping import GroupSize, check_group_size, num_groups

SCALE_DTYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
GRADIENTS = ("exact", "ste")
ARITHMETICS = ("default", "released")
REFINEMENTS = (None, "least_squares", "alternating")
TIED_SPARE_BITS = 2  # bits that a tied scale leaves free, so that 3/2 of it is a number of the same dtype


class QuantParams(NamedTuple):
    """What a group stores beside its codes. Shapes are ``[..., out, groups]`` (``[..., 1, 1]`` for ``"tensor"``).

    Attributes:
        scale: in the spec's `scale_dtype`; for codebook grids the scale of the positive weights.
        zero_point: integer codes as uint8, where the grid has one per group.
        scale_negative: scale of the negative weights, where the grid has one.
        scale_residual: scale of what the first one leaves, where the grid has one.
    """

    scale: Tensor
    zero_point: Tensor | None = None
    scale_negative: Tensor | None = None
    scale_residual: Tensor | None = None


@dataclass(frozen=True)
class QuantSpec:
    """How one weight is quantized; everything that changes the result is here.

    Attributes:
        grid: what the codes stand for.
        group_size: weights per scale along the input axis, ``-1`` for one group per output row, ``"tensor"`` for one
            group per matrix.
        scale_dtype: dtype the scales are stored in.
        zero_point_range: optional bounds (inclusive) of the zero points of an asymmetric affine grid.
        gradient: ``"exact"`` also follows the path through each group's minimum and maximum, or mean; ``"ste"`` does
            not.
        packing: how the codes lie in int32 words: ``"bitstream"``, or ``"base3"`` for grids with three levels.
        refine: how the closed-form scales of a residual grid are refined: `None`, ``"least_squares"`` or
            ``"alternating"``.
        arithmetic: ``"released"`` rounds codes and takes the range as BitDistiller's released code does (grids
            ``"int"`` and ``"nf"``; at ``"nf"`` both are the same); for comparisons.
    """

    grid: Grid
    group_size: GroupSize
    scale_dtype: torch.dtype = torch.float16
    zero_point_range: tuple[int, int] | None = None
    gradient: Literal["exact", "ste"] = "exact"
    packing: Literal["bitstream", "base3"] = "bitstream"
    refine: Literal["least_squares", "alternating"] | None = None
    arithmetic: Literal["default", "released"] = "default"

    @classmethod
    def create(
        cls,
        grid: str,
        bits: int,
        *,
        group_size: GroupSize = 128,
        scale_dtype: str = "float16",
        zero_point_range: tuple[int, int] | list[int] | None = None,
        gradient: str = "exact",
        refine: str | None = None,
        tied: bool = False,
        arithmetic: str = "default",
    ) -> QuantSpec:
        """Build a spec from plain values, as they stand in configs and checkpoints.

        Raises:
            ConfigError: a value outside its rule; the message names it and values that work.
        """
        resolved = get_grid(grid, bits)
        check_group_size(group_size)
        if not isinstance(scale_dtype, str) or scale_dtype not in SCALE_DTYPES:
            raise ConfigError(
                f"`scale_dtype` must be one of {list(SCALE_DTYPES)}: got scale_dtype={scale_dtype!r}. "
                "Use 'float16', or 'float32' for weights far from 1."
            )
        if gradient not in GRADIENTS:
            raise ConfigError(f"`gradient` must be one of {list(GRADIENTS)}: got gradient={gradient!r}. Use 'exact'.")
        bounds = _check_zero_point_range(resolved, zero_point_range)
        _check_residual(resolved, refine, tied)
        _check_arithmetic(grid, arithmetic, bounds)
        return cls(
            replace(resolved, is_tied=tied) if isinstance(resolved, ResidualGrid) else resolved,
            group_size,
            SCALE_DTYPES[scale_dtype],
            bounds,
            "exact" if gradient == "exact" else "ste",
            refine=refine,  # type: ignore[arg-type]  # one of REFINEMENTS
            arithmetic="released" if arithmetic == "released" else "default",
        )

    def packed_as(self, packing: str) -> QuantSpec:
        """The spec with its codes in another layout; grids that the layout cannot hold keep ``"bitstream"``."""
        return replace(self, packing="base3" if packing == "base3" and self.grid.num_levels == 3 else "bitstream")

    @property
    def scale_dtype_name(self) -> str:
        """The scale dtype as configs write it, e.g. ``"float16"``."""
        return str(self.scale_dtype).removeprefix("torch.")

    def param_shape(self, weight_shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        """Shape of scales and zero points for a weight ``[..., out, in]``.

        Raises:
            GroupSizeError: the group size does not divide the input width.
        """
        *batch, out_features, in_features = weight_shape
        if self.group_size == "tensor":
            return (*batch, 1, 1)
        return (*batch, out_features, num_groups(in_features, self.group_size))

    def to_dict(self) -> dict[str, object]:
        """The plain values that `create` takes."""
        return {
            "grid": self.grid.name,
            "bits": self.grid.bits,
            "group_size": self.group_size,
            "scale_dtype": self.scale_dtype_name,
            "zero_point_range": list(self.zero_point_range) if self.zero_point_range else None,
            "refine": self.refine,
            "tied": isinstance(self.grid, ResidualGrid) and self.grid.is_tied,
        }


def _check_zero_point_range(grid: Grid, bounds: tuple[int, int] | list[int] | None) -> tuple[int, int] | None:
    if bounds is None:
        return None
    if not isinstance(grid, AffineGrid) or not grid.has_zero_point:
        raise ConfigError(
            f"`zero_point_range` must be None for a grid without integer zero points: got zero_point_range={bounds!r}, "
            f"grid={grid.name!r}. Use grid='int'."
        )
    is_pair = isinstance(bounds, (tuple, list)) and len(bounds) == 2 and all(type(b) is int for b in bounds)
    if not is_pair or not 0 <= bounds[0] <= bounds[1] <= grid.max_code:
        raise ConfigError(
            f"`zero_point_range` must be two integers (low, high) within 0..{grid.max_code}: got "
            f"zero_point_range={bounds!r}. Use (1, 2) at 2 bits for llama.cpp formats, or None."
        )
    return (bounds[0], bounds[1])


def _check_arithmetic(grid: str, arithmetic: str, bounds: tuple[int, int] | None) -> None:
    if arithmetic not in ARITHMETICS:
        raise UnknownNameError("arithmetic", arithmetic, ARITHMETICS)
    if arithmetic == "released" and (grid not in ("int", "nf") or bounds is not None):
        raise ConfigError(
            "`arithmetic` must be 'default' except for the grids of BitDistiller's released code, unbounded: got "
            f"arithmetic='released', grid={grid!r}, zero_point_range={bounds!r}. Use grid='int' or 'nf' and "
            "zero_point_range=None, or arithmetic='default'."
        )


def _check_residual(grid: Grid, refine: object, tied: object) -> None:
    if refine not in REFINEMENTS:
        raise ConfigError(
            f"`refine` must be one of {list(REFINEMENTS)}: got refine={refine!r}. Use 'alternating' for the smallest "
            "error."
        )
    if type(tied) is not bool:
        raise ConfigError(f"`tied` must be True or False: got tied={tied!r}. Use False.")
    if isinstance(grid, ResidualGrid):
        return
    for name, value, default in (("refine", refine, None), ("tied", tied, False)):
        if value != default:
            raise ConfigError(
                f"`{name}` must be {default} for a grid without residual scales: got {name}={value!r}, "
                f"grid={grid.name!r}. Use grid='r2q', or {name}={default}."
            )
