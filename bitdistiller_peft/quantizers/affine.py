"""Evenly spaced codes: ``weight = scale * (code - zero_point)``.

The order of operations is fixed (it decides the last bit): scale in fp32, rounded up to its storage dtype, zero point
from the stored scale, codes from the stored scale, rounding half to even, and back in fp32.

With ``arithmetic="released"``, as in BitDistiller's released code: codes are rounded half away from zero (zero points
half to even), and the range is that of the weights, of at least 1e-5, whether zero lies in it or not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.grids import AffineGrid
from bitdistiller_peft.quantizers.base import REFERENCE_SWEEPS, Gradients, Quantizer, Sweeps, add_at_extreme
from bitdistiller_peft.quantizers.rounding import round_scale_up
from bitdistiller_peft.quantizers.spec import QuantParams, QuantSpec

LEAST_RANGE = 1e-5  # of the released arithmetic


def _grid(spec: QuantSpec) -> AffineGrid:
    if not isinstance(spec.grid, AffineGrid):
        raise TypeError(f"the affine quantizer needs an AffineGrid: got {spec.grid!r}")
    return spec.grid


def _zero_point(params: QuantParams, spec: QuantSpec) -> Tensor | float:
    fixed = _grid(spec).fixed_zero_point
    if fixed is not None:
        return float(fixed)
    if params.zero_point is None:
        raise TypeError("an asymmetric grid needs zero points")
    return params.zero_point.float().unsqueeze(-1)


class AffineQuantizer(Quantizer):
    """Grids ``int`` and ``int_sym``."""

    def find_params(self, groups: Tensor, spec: QuantSpec, sweeps: Sweeps = REFERENCE_SWEEPS) -> QuantParams:
        """Place the grid on each group's own range (min-max); by default with zero inside it."""
        if spec.arithmetic == "default":
            return super().find_params(groups, spec, sweeps)
        low, high = sweeps.ends(groups)
        grid = _grid(spec)
        scale = _stored((high - low).clamp(min=LEAST_RANGE) / grid.max_code, spec)
        zero_point = torch.round(-low / scale.float()).clamp(0, grid.max_code)
        return QuantParams(scale, zero_point.to(torch.uint8))

    def params_from_range(self, low: Tensor, high: Tensor, spec: QuantSpec) -> QuantParams:
        """Place the grid on ``[low, high]``: ``scale = (high - low) / max_code``; an empty range gets scale 1."""
        grid = _grid(spec)
        if grid.is_symmetric:
            scale = 2 * torch.maximum(high, -low) / grid.max_code
            return QuantParams(_stored(scale, spec))
        scale = _stored((high - low) / grid.max_code, spec)
        zero_point = torch.round(-low / scale.float())
        if spec.zero_point_range is None:
            return QuantParams(scale, zero_point.clamp(0, grid.max_code).to(torch.uint8))
        zero_point = zero_point.clamp(*spec.zero_point_range)
        sides = torch.maximum(*_side_scales(low, high, zero_point, grid.max_code))
        return QuantParams(_stored(sides, spec), zero_point.to(torch.uint8))

    def quantize(self, groups: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
        """Return the codes as fp32 integers ``0 .. max_code``."""
        codes = groups / params.scale.float().unsqueeze(-1)
        return _round(codes, spec).add_(_zero_point(params, spec)).clamp_(0, _grid(spec).max_code)

    def dequantize(self, codes: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
        """Return ``scale * (codes - zero_point)`` in fp32."""
        return (codes.float() - _zero_point(params, spec)).mul_(params.scale.float().unsqueeze(-1))

    def gradients(self, grad: Tensor, groups: Tensor, params: QuantParams, spec: QuantSpec) -> Gradients:
        """Pass gradients inside the range; clamped weights move only scale and zero point (LSQ, LSQ+)."""
        zero_point = _zero_point(params, spec)
        steps = groups / params.scale.float().unsqueeze(-1)
        codes = _round(steps.clone(), spec) + zero_point
        return even_gradients(grad, steps, codes, zero_point, params.scale.float(), _grid(spec).max_code)

    def add_range_gradient(
        self,
        grads: Gradients,
        groups: Tensor,
        params: QuantParams,
        spec: QuantSpec,
        sweeps: Sweeps = REFERENCE_SWEEPS,
    ) -> None:
        """Follow ``scale = (max - min) / max_code`` (or its symmetric and bounded forms) to the extreme weights."""
        grid = _grid(spec)
        low, low_index, high, high_index = sweeps.extremes(groups)
        if grid.is_symmetric:
            is_high = (high > -low) | ((high == -low) & (high_index < low_index))  # the first of the largest |w|
            sign = torch.where(is_high, high, low).sign()
            index = torch.where(is_high, high_index, low_index)
            add_at_extreme(grads.weight, index, 2 * grads.scale * sign / grid.max_code)
            return
        to_high, to_low = grads.scale / grid.max_code, -grads.scale / grid.max_code
        if spec.arithmetic == "released":
            is_free = high - low >= LEAST_RANGE
            add_at_extreme(grads.weight, high_index, torch.where(is_free, to_high, 0.0))
            add_at_extreme(grads.weight, low_index, torch.where(is_free, to_low, 0.0))
            return
        if spec.zero_point_range is not None and params.zero_point is not None:
            zero_point = params.zero_point.float()
            above, below = _side_scales(low.clamp(max=0), high.clamp(min=0), zero_point, grid.max_code)
            # where neither side has codes for its weights the scale is the constant 1
            to_high = torch.where(
                (above >= below) & (above > 0), grads.scale / (grid.max_code - zero_point).clamp(min=1), 0.0
            )
            to_low = torch.where(above < below, -grads.scale / zero_point.clamp(min=1), 0.0)
        # an extreme on the wrong side of zero is not the end of the range
        add_at_extreme(grads.weight, high_index, torch.where(high > 0, to_high, 0.0))
        add_at_extreme(grads.weight, low_index, torch.where(low < 0, to_low, 0.0))


def even_gradients(
    grad: Tensor, steps: Tensor, codes: Tensor, zero: Tensor | float, scale: Tensor, max_code: int
) -> Gradients:
    """Derive ``scale * (clamp(code) - zero)``, the rounding to a code seen as the identity (LSQ, LSQ+).

    Args:
        grad: gradient of the values, ``[..., groups, group]``.
        steps: the weights over their scale, likewise.
        codes: not yet clamped, likewise; overwritten.
        zero: where zero lies, to be broadcast over the group.
        scale: fp32 ``[..., groups]``.
        max_code: the largest code.
    """
    inside = (codes >= 0) & (codes <= max_code)
    offset = codes.clamp_(0, max_code) - zero
    grad_scale = (grad * torch.where(inside, offset - steps, offset)).sum(-1)
    weight = torch.where(inside, grad, 0.0)
    # d/dz of scale * (clamp(round(w/s) + z) - z): zero inside, -scale where clamped
    return Gradients(weight, grad_scale, zero_point=-((grad - weight).sum(-1) * scale))


def _round(steps: Tensor, spec: QuantSpec) -> Tensor:
    """Round in place: half to even, or half away from zero."""
    if spec.arithmetic == "default":
        return steps.round_()
    return steps.abs().add_(0.5).floor_().mul_(steps.sign_())


def _stored(scale: Tensor, spec: QuantSpec) -> Tensor:
    scale = torch.where(scale == 0, 1.0, scale)
    return round_scale_up(scale, spec.scale_dtype, furthest=_grid(spec).max_code)


def _side_scales(low: Tensor, high: Tensor, zero_point: Tensor, max_code: int) -> tuple[Tensor, Tensor]:
    """Scales at which each side of zero just fits; 0 for a side that the zero point leaves no codes."""
    above, below = max_code - zero_point, zero_point
    return (
        torch.where(above > 0, high / above.clamp(min=1), 0.0),
        torch.where(below > 0, -low / below.clamp(min=1), 0.0),
    )
