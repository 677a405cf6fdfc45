"""Codes for -1, 0 and 1 under the mean magnitude of the group: ``weight = scale * (code - 1)``.

Source: BitNet b1.58, as restated in BitNet Distillation (arXiv 2510.13998), equations 1 and 2. Differences: the scale
is rounded up to its storage dtype before anything is divided by it, and an all-zero group has scale 1, where the paper
adds a small number to the divisor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.quantizers.affine import AffineQuantizer
from bitdistiller_peft.quantizers.base import REFERENCE_SWEEPS, Gradients, SearchSpace, Sweeps, mean_magnitude
from bitdistiller_peft.quantizers.rounding import round_scale_up
from bitdistiller_peft.quantizers.spec import QuantParams, QuantSpec


class TernaryQuantizer(AffineQuantizer):
    """Grid ``ternary``: rounds and comes back like integers with zero point 1; only its scale is another."""

    def find_params(self, groups: Tensor, spec: QuantSpec, sweeps: Sweeps = REFERENCE_SWEEPS) -> QuantParams:
        """Take the mean magnitude of each group for its scale (absmean); an all-zero group gets scale 1."""
        return _stored(sweeps.mean_magnitude(groups), spec)

    def params_from_range(self, low: Tensor, high: Tensor, spec: QuantSpec) -> QuantParams:
        """Let the levels -1 and 1 meet the wider end of the range; an empty range gets scale 1."""
        return _stored(torch.maximum(high, -low), spec)

    def search_space(self, groups: Tensor, factors: tuple[float, ...]) -> SearchSpace:
        """Start at the mean magnitude and go outwards: dividing by each factor widens the range."""
        scale = mean_magnitude(groups)
        return SearchSpace(-scale, scale, tuple(1 / factor for factor in factors))

    def own_gradient(
        self,
        grad: Tensor,
        groups: Tensor,
        params: QuantParams,
        spec: QuantSpec,
        sweeps: Sweeps = REFERENCE_SWEEPS,
    ) -> Tensor:
        """Follow the scale to all weights (``"exact"``), or pass `grad` on to every weight, as published (``"ste"``).

        Published is the identity, for clamped weights too: a third of them would otherwise never move again.
        """
        return grad if spec.gradient == "ste" else super().own_gradient(grad, groups, params, spec, sweeps)

    def add_range_gradient(
        self,
        grads: Gradients,
        groups: Tensor,
        params: QuantParams,
        spec: QuantSpec,
        sweeps: Sweeps = REFERENCE_SWEEPS,
    ) -> None:
        """Follow ``scale = mean|w|`` to every weight of the group."""
        grads.weight.add_(groups.sign() * (grads.scale / groups.shape[-1]).unsqueeze(-1))


def _stored(scale: Tensor, spec: QuantSpec) -> QuantParams:
    return QuantParams(round_scale_up(torch.where(scale == 0, 1.0, scale), spec.scale_dtype))
