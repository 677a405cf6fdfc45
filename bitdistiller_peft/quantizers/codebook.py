"""Codes that stand for listed levels, with one scale for each sign: ``weight = scale(sign) * levels[code]``.

Source: AFPQ (arXiv 2311.01792), appendix B, algorithm 1. Differences: a group without positive (negative) weights is
quantized like all others; its absent scale is stored as 0 and never divided by.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.grids import CodebookGrid
from bitdistiller_peft.quantizers.base import Gradients, Quantizer, add_at_extreme
from bitdistiller_peft.quantizers.rounding import round_scale_up
from bitdistiller_peft.quantizers.spec import QuantParams, QuantSpec


def _grid(spec: QuantSpec) -> CodebookGrid:
    if not isinstance(spec.grid, CodebookGrid):
        raise TypeError(f"the codebook quantizer needs a CodebookGrid: got {spec.grid!r}")
    return spec.grid


def _levels(spec: QuantSpec, like: Tensor) -> Tensor:
    return torch.tensor(_grid(spec).levels, dtype=torch.float32, device=like.device)


class CodebookQuantizer(Quantizer):
    """Grids ``nf`` and ``nf_sym``, and any other list of levels."""

    def params_from_range(self, low: Tensor, high: Tensor, spec: QuantSpec) -> QuantParams:
        """Let the outermost levels meet ``high`` and ``low``; an empty group gets scale 1."""
        grid = _grid(spec)
        positive, negative = high / grid.levels[-1], low / grid.levels[0]
        if grid.is_symmetric:
            # the group must fit on both sides although the levels need not be mirror images
            scale = torch.maximum(positive, negative)
            return QuantParams(round_scale_up(torch.where(scale == 0, 1.0, scale), spec.scale_dtype))
        is_empty = (positive == 0) & (negative == 0)
        positive = torch.where(is_empty, 1.0, positive)
        return QuantParams(
            round_scale_up(positive, spec.scale_dtype),
            scale_negative=round_scale_up(negative, spec.scale_dtype),
        )

    def quantize(self, groups: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
        """Return the nearest level's code as int32; half-way values go to the lower level."""
        midpoints = torch.tensor(_grid(spec).midpoints, dtype=torch.float32, device=groups.device)
        return torch.bucketize(_normalized(groups, params).contiguous(), midpoints, out_int32=True)

    def dequantize(self, codes: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
        """Return ``scale(sign of the level) * levels[codes]`` in fp32."""
        values = _levels(spec, codes)[codes.int()]
        return values.mul_(_scale_of(values, params))

    def gradients(self, grad: Tensor, groups: Tensor, params: QuantParams, spec: QuantSpec) -> Gradients:
        """Pass gradients inside ``[lowest, highest level]``; each side's scale collects from its own weights."""
        grid = _grid(spec)
        x = _normalized(groups, params)
        levels = _levels(spec, groups)[self.quantize(groups, params, spec)]
        inside = (x >= grid.levels[0]) & (x <= grid.levels[-1])
        weight = torch.where(inside, grad, 0.0)
        to_scale = grad * torch.where(inside, levels - x, levels)
        if params.scale_negative is None:
            return Gradients(weight, to_scale.sum(-1))
        is_negative = groups < 0
        positive = torch.where(is_negative, 0.0, to_scale).sum(-1)
        return Gradients(weight, positive, scale_negative=torch.where(is_negative, to_scale, 0.0).sum(-1))

    def add_range_gradient(self, grads: Gradients, groups: Tensor, params: QuantParams, spec: QuantSpec) -> None:
        """Follow each scale to the extreme weight that it was taken from."""
        grid = _grid(spec)
        low, low_index = groups.min(-1)
        high, high_index = groups.max(-1)
        to_high, to_low = grads.scale / grid.levels[-1], grads.scale / grid.levels[0]
        if grads.scale_negative is not None:
            to_low = grads.scale_negative / grid.levels[0]
            use_high, use_low = high > 0, low < 0
        else:
            use_high = (high / grid.levels[-1] >= low / grid.levels[0]) & (high > 0)
            use_low = ~use_high & (low < 0)
        add_at_extreme(grads.weight, high_index, torch.where(use_high, to_high, 0.0))
        add_at_extreme(grads.weight, low_index, torch.where(use_low, to_low, 0.0))


def _scale_of(values: Tensor, params: QuantParams) -> Tensor:
    """The scale that belongs to each value's sign, fp32, broadcast over the group."""
    positive = params.scale.float().unsqueeze(-1)
    if params.scale_negative is None:
        return positive
    return torch.where(values < 0, params.scale_negative.float().unsqueeze(-1), positive)


def _normalized(groups: Tensor, params: QuantParams) -> Tensor:
    """The weights in units of their scale; an absent (zero) scale is replaced by 1 and meets only zeros."""
    scale = _scale_of(groups, params)
    return groups / torch.where(scale == 0, 1.0, scale)
