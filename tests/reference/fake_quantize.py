"""Fake quantization written out in fp64 for autograd to differentiate, rounding and codes being straight-through.

What decides a code, a quotient, is rounded to fp32 first, as its definition says; otherwise ties would differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.grids import CodebookGrid, FineGrid, ResidualGrid, TernaryGrid
from bitdistiller_peft.quantizers import QuantParams, QuantSpec, to_groups

Params = dict[str, Tensor]


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    return exact + (rounded - exact).detach()


# ----------------------------------------------------------------------------------- from groups and scales to values


def affine(groups: Tensor, scale: Tensor, zero_point: Tensor | float, top: int) -> Tensor:
    steps = groups / scale
    codes = (straight_through(steps, steps.float().round().double()) + zero_point).clamp(0, top)
    return scale * (codes - zero_point)


def fine(groups: Tensor, scale: Tensor, code: Tensor, top: int) -> Tensor:
    """Zero points lie in quarters about the middle of the codes; those that are not clamped move with them."""
    steps, zero = groups / scale, 3 * top / 8 + code / 4
    shifted = steps + zero
    codes = straight_through(shifted, (steps.float() + zero.float()).round().double()).clamp(0, top)
    return scale * (codes - zero)


def codebook(groups: Tensor, positive: Tensor, negative: Tensor, grid: CodebookGrid) -> Tensor:
    scale = torch.where(groups < 0, negative, positive)
    x = torch.where(scale == 0, groups, groups / torch.where(scale == 0, 1.0, scale))
    rounding = 1 + 2**-22  # an extreme divided by the scale taken from it is no clamped weight
    x = x.clamp(grid.levels[0] * rounding, grid.levels[-1] * rounding)
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    nearest = levels[(x.float().double().unsqueeze(-1) - levels).abs().argmin(-1)]  # of two, the lower
    return scale * straight_through(x, nearest)


def residual(groups: Tensor, scale: Tensor, second: Tensor) -> Tensor:
    """The weight moves its value one to one; the scales move it under signs that are constants."""
    large, small = torch.maximum(scale, second), torch.minimum(scale, second)
    sign = torch.where(groups >= 0, 1.0, -1.0).double()
    rest = torch.where(groups.detach() - sign * large.detach() >= 0, 1.0, -1.0).double()
    return sign * large + rest * small + groups - groups.detach()


# ------------------------------------------------------------------------------------- from groups to their own scales


def ends(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Each group's range, zero included; of several equal extremes one moves it (`amax` would share among them)."""
    return groups.min(-1, keepdim=True).values.clamp(max=0), groups.max(-1, keepdim=True).values.clamp(min=0)


def affine_scales(groups: Tensor, spec: QuantSpec) -> Params:
    low, high = ends(groups)
    top = spec.grid.num_levels - 1
    if not spec.grid.has_zero_point:
        return {"scale": 2 * groups.abs().max(-1, keepdim=True).values / top}
    scale = (high - low) / top
    zero_point = (-low / scale).round().detach()
    if spec.zero_point_range is not None:
        zero_point = zero_point.clamp(*spec.zero_point_range)
        scale = torch.maximum(high / (top - zero_point), -low / zero_point)
    return {"scale": scale, "zero_point": zero_point}


def fine_scales(groups: Tensor, top: int) -> Params:
    low, high = ends(groups)
    scale = (high - low) / top
    wanted = ((-low / scale - 3 * top / 8) * 4).round().detach()
    code = wanted.clamp(0, top)
    zero = 3 * top / 8 + code / 4
    alone = torch.maximum(high / (top - zero), -low / zero)
    return {"scale": torch.where(wanted == code, scale, alone), "zero_point": code}


def codebook_scales(groups: Tensor, grid: CodebookGrid) -> Params:
    low, high = ends(groups)
    positive, negative = high / grid.levels[-1], low / grid.levels[0]
    if grid.is_symmetric:
        return {"scale": torch.where(positive >= negative, positive, negative)}
    return {"scale": positive, "scale_negative": negative}


def residual_scales(groups: Tensor, spec: QuantSpec, tied: bool, stored: Tensor | None) -> Params:
    magnitudes = groups.abs()
    scale = magnitudes.mean(-1, keepdim=True)
    if spec.refine is None and stored is not None:
        scale = straight_through(scale, stored.double().unsqueeze(-1))  # the residual is what the stored scale leaves
    second = scale / 2 if tied else (magnitudes - scale).abs().mean(-1, keepdim=True)
    for _ in range({None: 0, "least_squares": 1, "alternating": 3}[spec.refine]):
        is_outer = magnitudes.detach() >= torch.maximum(scale, second).detach()
        if tied:
            steps = torch.where(is_outer, 1.5, 0.5).double()
            scale = (magnitudes * steps).sum(-1, keepdim=True) / steps.square().sum(-1, keepdim=True)
            second = scale / 2
        else:
            high, low = (
                torch.where(side, magnitudes, 0.0).sum(-1, keepdim=True) / side.sum(-1, keepdim=True)
                for side in (is_outer, ~is_outer)
            )
            scale, second = (high + low) / 2, (high - low) / 2
    return {"scale": scale} if tied else {"scale": scale, "scale_residual": second}


def own_scales(groups: Tensor, spec: QuantSpec, stored: QuantParams | None) -> Params:
    """The parameters as functions of the weights; zero points are integers and carry no gradient."""
    match spec.grid:
        case CodebookGrid():
            return codebook_scales(groups, spec.grid)
        case ResidualGrid():
            return residual_scales(groups, spec, spec.grid.is_tied, None if stored is None else stored.scale)
        case FineGrid():
            return fine_scales(groups, spec.grid.max_code)
        case TernaryGrid():
            return {"scale": groups.abs().mean(-1, keepdim=True)}
        case _:
            return affine_scales(groups, spec)


# ----------------------------------------------------------------------------------------------------------- together


def values_of(groups: Tensor, params: Params, spec: QuantSpec) -> Tensor:
    scale = params["scale"]
    match spec.grid:
        case CodebookGrid():
            return codebook(groups, scale, params.get("scale_negative", scale), spec.grid)
        case FineGrid():
            return fine(groups, scale, params["zero_point"], spec.grid.max_code)
        case ResidualGrid():
            return residual(groups, scale, params.get("scale_residual", scale / 2))
        case TernaryGrid():
            return affine(groups, scale, 1.0, 2)
        case _:
            top = spec.grid.num_levels - 1
            return affine(groups, scale, params.get("zero_point", torch.tensor((top + 1) / 2).double()), top)


def formula(weight: Tensor, spec: QuantSpec, params: Params | None = None, stored: QuantParams | None = None) -> Tensor:
    """Fake quantization in fp64.

    Args:
        weight: fp64 ``[..., out, in]``.
        spec: how to quantize.
        params: learned parameters, fp64 ``[..., out, groups]``; `None` for the weight's own.
        stored: what the weight's own scales become when they are stored, where that rounding is not to be neglected.
    """
    groups = to_groups(weight, spec.group_size)
    if params is not None:
        spread = {name: tensor.unsqueeze(-1) for name, tensor in params.items()}
        return values_of(groups, spread, spec).reshape(weight.shape)
    own = own_scales(groups, spec, stored)
    if stored is not None:
        found = {name: tensor for name, tensor in stored._asdict().items() if tensor is not None}
        own = {name: straight_through(tensor, found[name].double().unsqueeze(-1)) for name, tensor in own.items()}
    if spec.gradient == "exact":
        return values_of(groups, own, spec).reshape(weight.shape)
    values = values_of(groups, {name: tensor.detach() for name, tensor in own.items()}, spec)
    if isinstance(spec.grid, TernaryGrid):  # as published: every weight moves its value one to one
        values = straight_through(groups, values)
    return values.reshape(weight.shape)
