"""Codes that stand for listed levels, with one scale for each sign: ``weight = scale(sign) * levels[code]``.

Source: AFPQ (arXiv 2311.01792), appendix B, algorithm 1. Differences: a group without positive (negative) weights is
quantized like all others; its absent scale is stored as 0 and never divided by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.grids import CodebookGrid
from bitdistiller_peft.quantizers.base import REFERENCE_SWEEPS, Gradients, Quantizer, Sweeps, add_at_extreme
from bitdistiller_peft.quantizers.rounding import round_scale_up
from bitdistiller_peft.quantizers.spec import QuantParams, QuantSpec

# on a CPU, comparing with so many midpoints in turn, which vectorizes, is faster than a search for each weight
MOST_COMPARISONS = 15

# an extreme weight divided by the fp32 scale taken from it may exceed the outermost level by so much; it is not clamped
ROUNDING = 1 + 2**-22

# of fp32, and not normal: no scale can be stored as small as this, so that it is refused
SMALLEST = 2.0**-149


def _grid(spec: QuantSpec) -> CodebookGrid:
    if not isinstance(spec.grid, CodebookGrid):
        raise TypeError(f"the codebook quantizer needs a CodebookGrid: got {spec.grid!r}")
    return spec.grid


class CodebookQuantizer(Quantizer):
    """Grids ``nf`` and ``fp``, symmetric or not, and any other list of levels."""

    def params_from_range(self, low: Tensor, high: Tensor, spec: QuantSpec) -> QuantParams:
        """Let the outermost levels meet ``high`` and ``low``; an empty group gets scale 1."""
        grid = _grid(spec)
        positive, negative = _divided(high, grid.levels[-1]), _divided(low, grid.levels[0])
        if grid.is_symmetric:
            # the group must fit on both sides although the levels need not be mirror images
            scale = torch.maximum(positive, negative)
            furthest = max(grid.levels[-1], -grid.levels[0])
            scale = torch.where(scale == 0, 1.0, scale)
            return QuantParams(round_scale_up(scale, spec.scale_dtype, furthest=furthest))
        is_empty = (positive == 0) & (negative == 0)
        positive = torch.where(is_empty, 1.0, positive)
        return QuantParams(
            round_scale_up(positive, spec.scale_dtype, furthest=grid.levels[-1]),
            scale_negative=round_scale_up(negative, spec.scale_dtype, furthest=-grid.levels[0]),
        )

    def quantize(self, groups: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
        """Return the nearest level's code as uint8; half-way values go to the lower level."""
        return _nearest(_normalized(groups, params), _grid(spec))

    def dequantize(self, codes: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
        """Return ``scale(sign of the level) * levels[codes]`` in fp32."""
        values = _levels_of(codes, spec)
        scale, negative = _scales(params)
        if negative is None:
            return values.mul_(scale)
        return values.clamp(min=0).mul_(scale).add_(values.clamp_(max=0).mul_(negative))

    def gradients(self, grad: Tensor, groups: Tensor, params: QuantParams, spec: QuantSpec) -> Gradients:
        """Pass gradients inside ``[lowest, highest level]``; each side's scale collects from its own weights."""
        grid = _grid(spec)
        x = _normalized(groups, params)
        levels = _levels_of(_nearest(x, grid), spec)
        inside = (x >= grid.levels[0] * ROUNDING) & (x <= grid.levels[-1] * ROUNDING)
        weight = torch.where(inside, grad, 0.0)
        to_scale = grad * torch.where(inside, levels - x, levels)
        if params.scale_negative is None:
            return Gradients(weight, to_scale.sum(-1))
        is_negative = groups < 0
        positive = torch.where(is_negative, 0.0, to_scale).sum(-1)
        return Gradients(weight, positive, scale_negative=torch.where(is_negative, to_scale, 0.0).sum(-1))

    def add_range_gradient(
        self,
        grads: Gradients,
        groups: Tensor,
        params: QuantParams,
        spec: QuantSpec,
        sweeps: Sweeps = REFERENCE_SWEEPS,
    ) -> None:
        """Follow each scale to the extreme weight that it was taken from."""
        grid = _grid(spec)
        low, low_index, high, high_index = sweeps.extremes(groups)
        to_high, to_low = grads.scale / grid.levels[-1], grads.scale / grid.levels[0]
        if grads.scale_negative is not None:
            to_low = grads.scale_negative / grid.levels[0]
            use_high, use_low = high > 0, low < 0
        else:
            use_high = (high / grid.levels[-1] >= low / grid.levels[0]) & (high > 0)
            use_low = ~use_high & (low < 0)
        add_at_extreme(grads.weight, high_index, torch.where(use_high, to_high, 0.0))
        add_at_extreme(grads.weight, low_index, torch.where(use_low, to_low, 0.0))


def _divided(extreme: Tensor, level: float) -> Tensor:
    """The scale that lets a level meet an extreme weight: 0 for no such weight, never for one that is too small."""
    scale = extreme / level
    return torch.where((scale == 0) & (extreme != 0), SMALLEST, scale)


def _nearest(x: Tensor, grid: CodebookGrid) -> Tensor:
    """The code of the level nearest to each value: the number of midpoints below it."""
    midpoints = torch.tensor(grid.midpoints, dtype=torch.float32, device=x.device)
    if x.device.type != "cpu" or len(midpoints) > MOST_COMPARISONS:
        return torch.bucketize(x.contiguous(), midpoints, out_int32=True).to(torch.uint8)
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    for midpoint in midpoints:
        codes.add_(x > midpoint)
    return codes


def _levels_of(codes: Tensor, spec: QuantSpec) -> Tensor:
    """The levels of codes, fp32, a new tensor."""
    levels = torch.tensor(_grid(spec).levels, dtype=torch.float32, device=codes.device)
    return levels.index_select(0, codes.flatten().int()).view(codes.shape)


def _scales(params: QuantParams) -> tuple[Tensor, Tensor | None]:
    """The scale of all, or of the positive, and that of the negative weights, fp32, to be broadcast over the group."""
    negative = params.scale_negative
    return params.scale.float().unsqueeze(-1), None if negative is None else negative.float().unsqueeze(-1)


def _normalized(groups: Tensor, params: QuantParams) -> Tensor:
    """The weights in units of their scale; an absent (zero) scale is replaced by 1 and meets only zeros."""
    scale, negative = _scales(params)
    scale = torch.where(scale == 0, 1.0, scale)
    if negative is None:
        return groups / scale
    # each side's quotients, with zeros for the other side: their sum is exact
    negative = torch.where(negative == 0, 1.0, negative)
    return (groups.clamp(min=0) / scale).add_(groups.clamp(max=0) / negative)
