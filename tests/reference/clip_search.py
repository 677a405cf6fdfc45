"""The clip search from its definition, slowly: every pair of factors, outputs computed on the activations, in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitdistiller_peft.quantizers import QuantSpec, get_quantizer, to_groups


def output_error(moved: Tensor, inputs: Tensor) -> Tensor:
    """``||(Q(w) - w) x||^2``, mean over the tokens, of every output channel and group of inputs.

    Args:
        moved: ``Q(w) - w``, ``[out, in]`` cut into ``[out, groups, group]``.
        inputs: ``[tokens, in]``.
    """
    _, groups, width = moved.shape
    x = inputs.double().reshape(-1, groups, width)
    return torch.einsum("ogi,tgi->otg", moved.double(), x).square().mean(1)


def search(
    weight: Tensor, inputs: Tensor, spec: QuantSpec, factors: Sequence[float], *, clamp_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The first best range of each group of ``[out, in]``, and its error: low, high, error."""
    quantizer = get_quantizer(spec.grid)
    out_features, in_features = weight.shape
    width = spec.group_size if isinstance(spec.group_size, int) and spec.group_size > 0 else in_features
    groups = to_groups(weight, spec.group_size)
    minimum, maximum = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    best_low, best_high = minimum.clone(), maximum.clone()
    best = torch.full(minimum.shape, torch.inf, dtype=torch.float64)
    one_factor = not (spec.grid.has_zero_point or spec.grid.has_negative_scale)
    pairs = [(a, b) for a in factors for b in factors if a == b or not one_factor]
    for a, b in pairs:
        low, high = minimum * torch.tensor(a), maximum * torch.tensor(b)
        params = quantizer.params_from_range(low, high, spec)
        start = groups.clamp(low.unsqueeze(-1), high.unsqueeze(-1)) if clamp_weight else groups
        moved = quantizer.dequantize(quantizer.quantize(start, params, spec), params, spec) - groups
        error = output_error(moved.reshape(out_features, in_features // width, width), inputs)
        if spec.group_size == "tensor":
            error = error.sum().reshape(1, 1)
        better = error < best
        best = torch.where(better, error, best)
        best_low, best_high = torch.where(better, low, best_low), torch.where(better, high, best_high)
    return best_low, best_high, best
