"""Two signs with a scale each, the second for what the first leaves: ``weight = ±scale ± residual_scale``.

The scales are computed in closed form. With magnitudes ``u = |w|`` of a group:

* ``refine=None``: ``a1 = mean u``, ``a2 = mean |u - a1|``, the best scale of one sign and of the signs of its residual;
* ``refine="least_squares"``: the weights nearest to the inner levels, ``u < a1``, get their mean, and so do the others:
  ``a1 ± a2`` are these two means. This is the least-squares solution for the given codes;
* ``refine="alternating"``: nearest codes and least squares, three times in turn.

With tied scales, ``a2 = a1 / 2``, and ``1.5 * a1`` is a number of the storage dtype too: formats that store a step and
an offset hold the levels exactly.

Source: R2Q (arXiv 2511.21736) in our reconstruction, since only its abstract and reviews could be read. Alternating
refinement: Xu et al., Alternating Multi-bit Quantization (arXiv 1802.00150). The gradient through the means: XNOR-Net
(arXiv 1603.05279), section 3.1. A difference to the greedy rule: a weight always gets its nearest level, which is
another one where ``a2 > a1`` (a group of a few large weights among small ones).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.grids import ResidualGrid
from bitdistiller_peft.quantizers.base import (
    REFERENCE_SWEEPS,
    Gradients,
    Quantizer,
    SearchSpace,
    Sweeps,
    mean_magnitude,
    wide_dtype,
)
from bitdistiller_peft.quantizers.rounding import check_residual_scale, check_scale, round_scale_up
from bitdistiller_peft.quantizers.spec import TIED_SPARE_BITS, QuantParams, QuantSpec

ROUNDS = {None: 0, "least_squares": 1, "alternating": 3}
_NO_RANGE = (
    "`grid` must have a range to search: got grid='r2q', which takes its scales from means. Use refine='alternating', "
    "which fits them to the weights, and leave such layers out with skip or the search with clip_search=False."
)


class _Fit(NamedTuple):
    """Scales, and what they were computed from.

    Attributes:
        params: as stored.
        is_outer: weights ``[..., groups, group]`` on an outer level when the scales were fitted.
        is_fitted: groups ``[..., groups]`` whose scales come from least squares; the others have the greedy ones.
    """

    params: QuantParams
    is_outer: Tensor
    is_fitted: Tensor


class ResidualQuantizer(Quantizer):
    """Grid ``r2q``."""

    def params_from_range(self, low: Tensor, high: Tensor, spec: QuantSpec) -> QuantParams:
        """Refuse: two scales do not follow from the ends of a range.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(_NO_RANGE)

    def search_space(self, groups: Tensor, factors: tuple[float, ...]) -> SearchSpace:
        """Refuse, as `params_from_range` does.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(_NO_RANGE)

    def find_params(self, groups: Tensor, spec: QuantSpec, sweeps: Sweeps = REFERENCE_SWEEPS) -> QuantParams:
        """Compute both scales in closed form, refined as `spec.refine` says."""
        return _fit(groups, spec).params

    def quantize(self, groups: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
        """Return the nearest level's code as uint8; half-way values, and zero, go to the upper level."""
        first, second, is_swapped = _signs(groups, params)
        codes = first.to(torch.uint8).mul_(2).add_(second)
        if is_swapped is None:
            return codes
        # the larger scale's sign belongs in the low bit there: codes 1 and 2 change places
        return codes.bitwise_xor_((first ^ second).logical_and_(is_swapped).to(torch.uint8).mul_(3))

    def dequantize(self, codes: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
        """Return ``±scale ± residual_scale`` in fp32."""
        scale, residual = _scales(params)
        first, second = _as_numbers(codes)
        return first.mul_(scale).add_(second.mul_(residual))

    def gradients(self, grad: Tensor, groups: Tensor, params: QuantParams, spec: QuantSpec) -> Gradients:
        """Pass `grad` to every weight, nothing being clamped; each scale collects it under its own signs."""
        first, second = _as_numbers(self.quantize(groups, params, spec))
        to_scale, to_residual = first.mul_(grad).sum(-1), second.mul_(grad).sum(-1)
        if params.scale_residual is None:
            return Gradients(grad.clone(), to_scale + to_residual / 2)
        return Gradients(grad.clone(), to_scale, scale_residual=to_residual)

    def add_range_gradient(
        self,
        grads: Gradients,
        groups: Tensor,
        params: QuantParams,
        spec: QuantSpec,
        sweeps: Sweeps = REFERENCE_SWEEPS,
    ) -> None:
        """Follow both scales to the weights whose means they are; the codes are constants."""
        fit = _fit(groups, spec)
        fitted = _to_magnitudes_fitted(grads, fit.is_outer)
        greedy = _to_magnitudes_greedy(grads, groups, params)
        path = torch.where(fit.is_fitted.unsqueeze(-1), fitted, greedy)
        grads.weight.add_(path.mul_(groups.sign()))

    def check(self, params: QuantParams) -> None:
        """Refuse scales that cannot be stored; see `check_residual_scale` for the second one.

        Raises:
            WeightError: the weight had NaN or Inf.
            ScaleRangeError: a scale overflows, or the first one is subnormal in its dtype.
        """
        check_scale(params.scale)
        if params.scale_residual is not None:
            check_residual_scale(params.scale_residual)


def _scales(params: QuantParams) -> tuple[Tensor, Tensor]:
    """Both scales in fp32, to be broadcast over the group."""
    scale = params.scale.float().unsqueeze(-1)
    residual = scale / 2 if params.scale_residual is None else params.scale_residual.float().unsqueeze(-1)
    return scale, residual


def _as_numbers(codes: Tensor) -> tuple[Tensor, Tensor]:
    """The signs of codes as fp32 -1 and 1."""
    codes = codes.to(torch.uint8)
    return tuple(bit.float().mul_(2).sub_(1) for bit in (codes >> 1, codes & 1))  # type: ignore[return-value]


def _signs(groups: Tensor, params: QuantParams) -> tuple[Tensor, Tensor, Tensor | None]:
    """Whether each sign is positive, that of the larger scale first, and whether that is the residual scale."""
    scale, residual = _scales(params)
    groups = groups + 0.0  # -0 counts as 0
    first = groups >= 0
    second = groups >= torch.copysign(torch.maximum(scale, residual), groups)
    return first, second, None if params.scale_residual is None else residual > scale


# ------------------------------------------------------------------------------------------------------- closed forms


def _fit(groups: Tensor, spec: QuantSpec) -> _Fit:
    params = _greedy(groups, spec)
    fit = _Fit(params, torch.zeros_like(groups, dtype=torch.bool), torch.zeros_like(params.scale, dtype=torch.bool))
    for _ in range(ROUNDS[spec.refine]):
        fit = _refit(groups, fit, spec)
    return fit


def _greedy(groups: Tensor, spec: QuantSpec) -> QuantParams:
    """The best scale of the signs, then the best scale of the signs of the residual, each the stored one."""
    scale = mean_magnitude(groups)
    if _is_tied(spec):
        # the tied grid has no level zero: an all-zero group comes as near to it as the dtype allows
        return _stored(torch.where(scale == 0, torch.finfo(spec.scale_dtype).tiny, scale), None, spec)
    stored = round_scale_up(torch.where(scale == 0, 1.0, scale), spec.scale_dtype, furthest=2)
    residual = mean_magnitude(groups.abs() - stored.float().unsqueeze(-1))
    return QuantParams(stored, scale_residual=round_scale_up(residual, spec.scale_dtype))


def _refit(groups: Tensor, fit: _Fit, spec: QuantSpec) -> _Fit:
    """Solve the least-squares problem for the codes under `fit`; groups on one pair of levels only keep what they have.

    A tied scale has a solution for any codes; only an all-zero group keeps what it has.
    """
    first, second, _ = _signs(groups, fit.params)
    is_outer = first == second
    outer = is_outer.sum(-1)
    inner = groups.shape[-1] - outer
    magnitudes = groups.abs()
    total_outer = torch.where(is_outer, magnitudes, 0.0).sum(-1, dtype=wide_dtype(groups))
    total_inner = torch.where(is_outer, 0.0, magnitudes).sum(-1, dtype=wide_dtype(groups))
    if _is_tied(spec):
        scale = (1.5 * total_outer + 0.5 * total_inner) / (2.25 * outer + 0.25 * inner)
        can_fit, params = scale > 0, _stored(scale.float(), None, spec)
    else:
        high, low = total_outer / outer.clamp(min=1), total_inner / inner.clamp(min=1)
        can_fit = (outer > 0) & (inner > 0)
        params = _stored(((high + low) / 2).float(), ((high - low) / 2).float(), spec)
    chosen = (
        None if new is None or old is None else torch.where(can_fit, new, old)
        for new, old in zip(params, fit.params, strict=True)
    )
    return _Fit(
        QuantParams(*chosen),  # type: ignore[arg-type]
        torch.where(can_fit.unsqueeze(-1), is_outer, fit.is_outer),
        fit.is_fitted | can_fit,
    )


def _is_tied(spec: QuantSpec) -> bool:
    return isinstance(spec.grid, ResidualGrid) and spec.grid.is_tied


def _stored(scale: Tensor, residual: Tensor | None, spec: QuantSpec) -> QuantParams:
    if residual is None:
        return QuantParams(round_scale_up(scale, spec.scale_dtype, spare_bits=TIED_SPARE_BITS, furthest=2))
    return QuantParams(
        round_scale_up(scale, spec.scale_dtype, furthest=2),
        scale_residual=round_scale_up(residual, spec.scale_dtype),
    )


# ----------------------------------------------------------------------------------------- derivatives of closed forms


def _to_magnitudes_greedy(grads: Gradients, groups: Tensor, params: QuantParams) -> Tensor:
    """What reaches each magnitude through ``a1 = mean u`` and ``a2 = mean |u - a1|``."""
    through_scale = (grads.scale / groups.shape[-1]).unsqueeze(-1)
    if grads.scale_residual is None:
        return through_scale.expand(groups.shape).clone()
    above = (groups.abs() - params.scale.float().unsqueeze(-1)).sign_()
    through_residual = (grads.scale_residual / groups.shape[-1]).unsqueeze(-1)
    return (above - above.mean(-1, keepdim=True)).mul_(through_residual).add_(through_scale)


def _to_magnitudes_fitted(grads: Gradients, is_outer: Tensor) -> Tensor:
    """What reaches each magnitude through the least-squares scales."""
    outer = is_outer.sum(-1)
    inner = is_outer.shape[-1] - outer
    if grads.scale_residual is None:
        per_level = grads.scale / (2.25 * outer + 0.25 * inner)
        to_outer, to_inner = 1.5 * per_level, 0.5 * per_level
    else:
        to_outer = (grads.scale + grads.scale_residual) / (2 * outer.clamp(min=1))
        to_inner = (grads.scale - grads.scale_residual) / (2 * inner.clamp(min=1))
    return torch.where(is_outer, to_outer.unsqueeze(-1), to_inner.unsqueeze(-1))
