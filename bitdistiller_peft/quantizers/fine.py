"""Evenly spaced codes around zero points in quarter steps: ``weight = scale * (code - zero)``.

With ``M`` the largest code and ``c`` the stored one of the zero point, ``zero = (1.5 * M + c) / 4``: quarter steps
about the middle of the codes, where the zero of a group of weights of both signs lies. Integers spend as many bits on
zero points at the outer codes, which such groups seldom need, and none on those between two codes.

The order of operations is fixed: scale in fp32, rounded up to its storage dtype, zero point from the stored scale;
codes are ``round(weight / scale + zero)``, half to even; and back in fp32, where ``code - zero`` is exact. No level is
zero: a group of zeros gets the scale `ZERO_SCALE`, whose levels are next to nothing.

Source: our own. Affine grids whose zero need not be a code are known from HQQ (zero points in fp16) and llama.cpp's
Q2_K (a 4-bit minimum); here they take no bit more than integers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bitdistiller_peft.grids import FineGrid, Grid
from bitdistiller_peft.quantizers.affine import even_gradients
from bitdistiller_peft.quantizers.base import REFERENCE_SWEEPS, Gradients, Quantizer, Sweeps, add_at_extreme
from bitdistiller_peft.quantizers.rounding import round_scale_up
from bitdistiller_peft.quantizers.spec import QuantParams, QuantSpec

ZERO_SCALE = 2.0**-14  # the least normal number of float16


class _Place(NamedTuple):
    """Where the grid lies on a range, all ``[..., groups]``.

    Attributes:
        params: as stored.
        above: steps from zero to the last code.
        below: steps from the first code to zero.
        is_far: whether zero lies beyond the last zero point, so that one end alone sets the scale.
    """

    params: QuantParams
    above: Tensor
    below: Tensor
    is_far: Tensor


class FineQuantizer(Quantizer):
    """Grid ``int_fine``."""

    def params_from_range(self, low: Tensor, high: Tensor, spec: QuantSpec) -> QuantParams:
        """Place the grid on ``[low, high]``; where one sign prevails so much that no zero point fits, on both ends."""
        return _place(low, high, spec).params

    def quantize(self, groups: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
        """Return the codes as fp32 integers ``0 .. max_code``."""
        codes = groups / params.scale.float().unsqueeze(-1)
        return codes.add_(_zero(params, spec)).round_().clamp_(0, _grid(spec).max_code)

    def dequantize(self, codes: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
        """Return ``scale * (codes - zero)`` in fp32."""
        return (codes.float() - _zero(params, spec)).mul_(params.scale.float().unsqueeze(-1))

    def gradients(self, grad: Tensor, groups: Tensor, params: QuantParams, spec: QuantSpec) -> Gradients:
        """Pass gradients inside the range; clamped weights move only scale and zero point (LSQ, LSQ+)."""
        grid, zero, scale = _grid(spec), _zero(params, spec), params.scale.float()
        steps = groups / scale.unsqueeze(-1)
        weight, to_scale, _, to_zero, _ = even_gradients(
            grad, steps, (steps + zero).round_(), zero, scale, grid.max_code
        )
        return Gradients(weight, to_scale, zero_point=None if to_zero is None else to_zero * grid.zero_step)

    def add_range_gradient(
        self,
        grads: Gradients,
        groups: Tensor,
        params: QuantParams,
        spec: QuantSpec,
        sweeps: Sweeps = REFERENCE_SWEEPS,
    ) -> None:
        """Follow the scale to the extreme weights: to both, or to the one that sets it alone."""
        low, low_index, high, high_index = sweeps.extremes(groups)
        low, high = low.clamp(max=0), high.clamp(min=0)
        place, both = _place(low, high, spec), grads.scale / _grid(spec).max_code
        is_above = high / place.above >= -low / place.below
        to_high = torch.where(place.is_far, torch.where(is_above, grads.scale / place.above, 0.0), both)
        to_low = torch.where(place.is_far, torch.where(is_above, 0.0, grads.scale / place.below), both)
        # an extreme on the wrong side of zero is not the end of the range
        add_at_extreme(grads.weight, high_index, torch.where(high > 0, to_high, 0.0))
        add_at_extreme(grads.weight, low_index, torch.where(low < 0, -to_low, 0.0))


def _grid(spec: QuantSpec) -> FineGrid:
    if not isinstance(spec.grid, FineGrid):
        raise TypeError(f"the fine quantizer needs a FineGrid: got {spec.grid!r}")
    return spec.grid


def zero_of(zero_point: Tensor, grid: Grid) -> Tensor:
    """Where zero lies, in steps of the weights' codes: what stored zero points of a grid stand for, fp32 and exact."""
    return zero_point.float() * grid.zero_step + grid.first_zero


def _zero(params: QuantParams, spec: QuantSpec) -> Tensor:
    """Zero points, to be broadcast over the group."""
    if params.zero_point is None:
        raise TypeError("grid 'int_fine' needs zero points")
    return zero_of(params.zero_point, _grid(spec)).unsqueeze(-1)


def _place(low: Tensor, high: Tensor, spec: QuantSpec) -> _Place:
    grid = _grid(spec)
    scale = _stored((high - low) / grid.max_code, spec)
    code = torch.round((-low / scale.float() - grid.first_zero) / grid.zero_step)
    is_far = (code < 0) | (code > grid.max_code)
    zero_point = code.clamp(0, grid.max_code).to(torch.uint8)
    below = zero_of(zero_point, grid)
    above = grid.max_code - below
    alone = _stored(torch.maximum(high / above, -low / below), spec)
    return _Place(QuantParams(torch.where(is_far, alone, scale), zero_point), above, below, is_far)


def _stored(scale: Tensor, spec: QuantSpec) -> Tensor:
    scale = torch.where(scale == 0, ZERO_SCALE, scale)
    return round_scale_up(scale, spec.scale_dtype, furthest=_grid(spec).max_code)
