"""Asymmetric clip search: the range of each group that disturbs the layer's output least.

For one output channel and one group of its inputs, a candidate range gives quantized weights ``Q(w)`` and an output
error ``||Q(w) X - w X||^2``. Written out, that is ``d H d`` with ``d = Q(w) - w`` and ``H = X X^T``, the Gram matrix of
the group's inputs. So the activations are looked at once, whatever their number, and a candidate costs ``group^2``
multiplications instead of ``group * tokens``. Nothing is approximated.

Two grids have further structure that keeps the search exact:

* where positive and negative weights have scales of their own (``nf``), ``d`` is the sum of a part that only the
  maximum moves and one that only the minimum moves; 10 x 10 candidates then take 10 quantizations and 10 products;
* where one scale serves both signs, shrinking both ends together already visits every scale worth visiting.

A grid whose scale is a mean (``ternary``) has no range of its own. There the search starts at that mean and goes
outwards, scale by scale; the range it gives is that of the outermost levels.

Source: BitDistiller (arXiv 2402.10631), section 3.1; the candidates are those of its released code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.grids import CodebookGrid, TernaryGrid
from bitdistiller_peft.quantizers import QuantParams, QuantSpec, get_quantizer, to_groups

FACTORS = tuple(1 - i / 20 for i in range(10))
TILE_ELEMENTS = 1 << 19  # weights times candidates at work at once: small enough for a CPU's cache


class ClipRange(NamedTuple):
    """The chosen range of every group and what it costs; fp32, shape ``spec.param_shape(weight.shape)``.

    Attributes:
        low: lower end of the range, ``<= 0``.
        high: upper end, ``>= 0``.
        error_before: mean squared output error per token with min-max.
        error_after: the same with ``[low, high]``.
        energy: mean squared output of the unquantized group, what the errors are relative to.
    """

    low: Tensor
    high: Tensor
    error_before: Tensor
    error_after: Tensor
    energy: Tensor


def group_width(spec: QuantSpec, in_features: int) -> int:
    """Inputs that share a Gram matrix: the group size, or all of them where a group is a row or more."""
    return spec.group_size if isinstance(spec.group_size, int) and spec.group_size > 0 else in_features


def search_range(
    weight: Tensor, gram: Tensor, spec: QuantSpec, *, factors: Sequence[float] = FACTORS, clamp_weight: bool = False
) -> ClipRange:
    """Find the range ``[min * a, max * b]`` of each group with the smallest output error, over all pairs of factors.

    Args:
        weight: ``[..., out, in]``.
        gram: Gram matrices of the inputs, ``[..., in / width, width, width]`` with ``width = group_width(...)``.
        spec: how the weight is quantized.
        factors: what the ends of the min-max range are multiplied by; the first must be 1.
        clamp_weight: also clamp the weights to the range before they are rounded, as where min-max of the clamped
            weight is what quantizes it later.

    Returns:
        The best range of every group; of equals, the one that comes first in the list of factors.

    Raises:
        ConfigError: the scales of the grid do not follow from a range.
    """
    check_searchable(spec, clamp_weight=clamp_weight)
    *batch, out_features, in_features = weight.shape
    width = group_width(spec, in_features)
    # the axes that quantizers call [..., groups, group] are [group of inputs, output channel, input] from here on
    groups = to_groups(weight.detach().float(), width).movedim(-2, -3).reshape(-1, out_features, width)
    gram = gram.float().reshape(-1, width, width)
    is_shared = spec.group_size == "tensor"
    space = get_quantizer(spec.grid).search_space(
        groups.reshape(len(groups), 1, -1) if is_shared else groups, tuple(factors)
    )
    low, high = space.low, space.high
    search = _Search(spec, space.factors, weight.dtype if clamp_weight else None)
    found = ClipRange(*(torch.empty_like(low) for _ in ClipRange._fields))
    for tile in _tiles(groups.shape, len(factors), is_shared):
        best = search.best(groups[tile], gram[tile[0]], low[tile], high[tile])
        for whole, part in zip(found, best, strict=True):
            whole[tile] = part

    def as_params(values: Tensor) -> Tensor:
        return values.reshape(*batch, -1, low.shape[-1]).transpose(-1, -2).contiguous()

    return ClipRange(*map(as_params, found))


def check_searchable(spec: QuantSpec, *, clamp_weight: bool) -> None:
    """Refuse grids whose scales do not follow from a range as the search would set it.

    Args:
        spec: how the weight is quantized.
        clamp_weight: whether the range takes effect by clamping the weight, whose own parameters then quantize it.

    Raises:
        ConfigError: see above.
    """
    get_quantizer(spec.grid).search_space(torch.zeros(1, 1), FACTORS)  # a family without ranges says so
    if clamp_weight and isinstance(spec.grid, TernaryGrid):
        raise ConfigError(
            "`learn_scale` must be True to search the ranges of grid='ternary': got learn_scale=False, where the "
            "scale is the mean magnitude whatever the range. Use learn_scale=True, or leave such layers out with skip."
        )


def _tiles(shape: torch.Size, num_factors: int, is_shared: bool) -> Iterator[tuple[slice, slice]]:
    """Cut ``[groups, out]`` into pieces whose candidates fit in a cache; rows that share a scale stay together."""
    num_groups, rows, width = shape
    per_row = width * num_factors
    row_step = rows if is_shared else max(1, min(rows, TILE_ELEMENTS // per_row))
    group_step = max(1, TILE_ELEMENTS // (per_row * row_step))
    for group in range(0, num_groups, group_step):
        for row in range(0, rows, row_step):
            yield slice(group, group + group_step), slice(row, row + row_step)


@dataclass(frozen=True)
class _Search:
    """One search; weights are ``[groups, out, in]``, Gram matrices ``[groups, in, in]``, ends ``[groups, out]``."""

    spec: QuantSpec
    factors: tuple[float, ...]
    clamp_dtype: torch.dtype | None

    def best(self, groups: Tensor, gram: Tensor, low: Tensor, high: Tensor) -> ClipRange:
        errors, pairs = self._errors(groups, gram, low, high)
        energy = _quadratic(groups.unsqueeze(1), gram).squeeze(1)
        if self.spec.group_size == "tensor":
            errors, energy = errors.sum(-1, keepdim=True), energy.sum(-1, keepdim=True)
        after, index = errors.min(1)  # of equal values the first, hence the widest range
        low, high = self._ends(low, high, pairs[index.flatten()].view(*index.shape, 2))
        return ClipRange(low, high, errors[:, 0], after, energy)

    def _ends(self, low: Tensor, high: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        low, high = low * factors[..., 0], high * factors[..., 1]
        if self.clamp_dtype is None:
            return low, high
        return low.to(self.clamp_dtype).float(), high.to(self.clamp_dtype).float()  # as the clamped weight holds them

    def _errors(self, groups: Tensor, gram: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The error of every candidate, ``[groups, candidates, out]``, and its factors ``[candidates, 2]``."""
        factors = torch.tensor(self.factors, dtype=torch.float32, device=groups.device)
        together = torch.stack((factors, factors), -1)
        pairs = torch.cartesian_prod(factors, factors)
        if isinstance(self.spec.grid, CodebookGrid) and self.spec.grid.has_negative_scale:
            moved, bad = self._moved(groups, low, high, together)
            bad = (bad.unsqueeze(2) | bad.unsqueeze(1)).flatten(1, 2)
            return _two_sided(moved, groups > 0, gram).masked_fill_(bad, torch.inf), pairs
        candidates = pairs if self.spec.grid.has_zero_point else together
        parts = []
        for part in torch.split(candidates, len(factors)):
            moved, bad = self._moved(groups, low, high, part)
            parts.append(_quadratic(moved, gram).masked_fill_(bad, torch.inf))
        return torch.cat(parts, 1), candidates

    def _moved(self, groups: Tensor, low: Tensor, high: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """``Q(w) - w`` for some candidates, ``[groups, candidates, out, in]``, and whether a scale cannot be stored."""
        quantizer = get_quantizer(self.spec.grid)
        low, high = self._ends(low.unsqueeze(1), high.unsqueeze(1), factors.unsqueeze(1))
        params = quantizer.params_from_range(low, high, self.spec)
        weights = groups.unsqueeze(1)
        clamped = weights
        if self.clamp_dtype is not None:
            clamped = torch.clamp(weights, low.unsqueeze(-1), high.unsqueeze(-1))
        codes = quantizer.quantize(clamped, params, self.spec)
        return quantizer.dequantize(codes, params, self.spec).sub_(weights), _unstorable(params, self.spec)


def _quadratic(moved: Tensor, gram: Tensor) -> Tensor:
    """``d H d`` for ``d`` ``[groups, candidates, out, in]``: ``[groups, candidates, out]``."""
    products = (moved.flatten(1, 2) @ gram).view_as(moved)
    return products.mul_(moved).sum(-1)


def _two_sided(moved: Tensor, is_positive: Tensor, gram: Tensor) -> Tensor:
    """The errors of all pairs, low factor first, from ``Q(w) - w`` with both ends moved together."""
    above, below = (torch.where(side.unsqueeze(1), moved, 0.0) for side in (is_positive, ~is_positive))
    own_above, own_below = _quadratic(above, gram), _quadratic(below, gram)
    # [groups, out, low, in] x [groups, out, in, high]
    products = (below.flatten(1, 2) @ gram).view_as(below).transpose(1, 2)
    cross = (products @ above.permute(0, 2, 3, 1)).permute(0, 2, 3, 1)
    total = own_below.unsqueeze(2) + own_above.unsqueeze(1) + 2 * cross
    return total.flatten(1, 2).clamp_(min=0)  # rounding may take an error of nothing below zero


def _unstorable(params: QuantParams, spec: QuantSpec) -> Tensor:
    """Scales that packing would refuse: subnormal or infinite in the dtype they are stored in."""
    info = torch.finfo(spec.scale_dtype)
    bad = torch.zeros_like(params.scale, dtype=torch.bool)
    for scale in (params.scale, params.scale_negative):
        if scale is not None:
            bad |= ((scale < info.tiny) & (scale != 0)) | ~torch.isfinite(scale)
    return bad
