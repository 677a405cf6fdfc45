"""The contract of a quantizer: how a family of grids finds its parameters, rounds, comes back, and passes gradients.

All methods work on groups, ``[..., groups, group]`` in fp32 (see `grouping`); parameters lack the last axis. A
quantizer has no state: the same four pure methods serve training, packing and the reference kernel, which is what
makes "what was trained is what is packed" true by construction.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from bitdistiller_peft.quantizers.rounding import check_scale
from bitdistiller_peft.quantizers.spec import QuantParams, QuantSpec


class Gradients(NamedTuple):
    """What flows back through fake quantization, group by group."""

    weight: Tensor
    scale: Tensor
    scale_negative: Tensor | None = None
    zero_point: Tensor | None = None
    scale_residual: Tensor | None = None


class SearchSpace(NamedTuple):
    """The ranges among which a clip search chooses: ``low * a`` to ``high * b`` for factors ``a`` and ``b``.

    Attributes:
        low: ``[..., groups]``, fp32, ``<= 0``.
        high: ``[..., groups]``, fp32, ``>= 0``.
        factors: the first is 1, where `Quantizer.find_params` places the grid.
    """

    low: Tensor
    high: Tensor
    factors: tuple[float, ...]


class Extremes(NamedTuple):
    """The lowest and highest weight of each group, fp32, and where each first stands, int64: all ``[..., groups]``."""

    low: Tensor
    low_index: Tensor
    high: Tensor
    high_index: Tensor


class Sweeps:
    """The passes over whole weights that fake quantization makes: here plain torch, the reference.

    A backend overrides what it does faster. Values must then equal these bit for bit; gradients are sums over a group
    and may differ in their last bits.
    """

    def ends(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return each group's lowest and highest weight, fp32 ``[..., groups]``; NaN if it holds one."""
        low, high = torch.aminmax(groups, dim=-1)
        return low, high

    def mean_magnitude(self, groups: Tensor) -> Tensor:
        """Return the mean of ``|w|`` over each group, summed in fp64, fp32 ``[..., groups]``."""
        return mean_magnitude(groups)

    def extremes(self, groups: Tensor) -> Extremes:
        """Find the ends of each group and where they stand."""
        low, low_index = groups.min(-1)
        high, high_index = groups.max(-1)
        return Extremes(low, low_index, high, high_index)

    def values(self, quantizer: Quantizer, groups: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
        """Round to codes and return what they stand for, fp32, like `groups`."""
        return quantizer.dequantize(quantizer.quantize(groups, params, spec), params, spec)

    def gradients(
        self, quantizer: Quantizer, grad: Tensor, groups: Tensor, params: QuantParams, spec: QuantSpec
    ) -> Gradients:
        """See `Quantizer.gradients`."""
        return quantizer.gradients(grad, groups, params, spec)


REFERENCE_SWEEPS = Sweeps()


class Quantizer(ABC):
    """One family of grids. Subclasses are final."""

    @abstractmethod
    def params_from_range(self, low: Tensor, high: Tensor, spec: QuantSpec) -> QuantParams:
        """Place the grid on the range ``[low, high]`` of each group.

        Args:
            low: smallest value of each group or zero, fp32, ``<= 0``.
            high: largest value of each group or zero, fp32, ``>= 0``.
            spec: the grid and how scales are stored.
        """

    @abstractmethod
    def quantize(self, groups: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
        """Round to codes; any dtype that holds them exactly. Ties go to the even code (affine) or lower level."""

    @abstractmethod
    def dequantize(self, codes: Tensor, params: QuantParams, spec: QuantSpec) -> Tensor:
        """Return the fp32 values that codes ``[..., groups, group]`` stand for."""

    @abstractmethod
    def gradients(self, grad: Tensor, groups: Tensor, params: QuantParams, spec: QuantSpec) -> Gradients:
        """Derive fake quantization with the parameters held fixed, rounding seen as the identity inside the range.

        Args:
            grad: gradient of the fake-quantized values, like `groups`.
            groups: the weights.
            params: the parameters used forward.
            spec: the grid.
        """

    @abstractmethod
    def add_range_gradient(
        self,
        grads: Gradients,
        groups: Tensor,
        params: QuantParams,
        spec: QuantSpec,
        sweeps: Sweeps = REFERENCE_SWEEPS,
    ) -> None:
        """Add, in place, to ``grads.weight`` what reaches the weights through the scales computed from them."""

    def own_gradient(
        self,
        grad: Tensor,
        groups: Tensor,
        params: QuantParams,
        spec: QuantSpec,
        sweeps: Sweeps = REFERENCE_SWEEPS,
    ) -> Tensor:
        """Derive fake quantization whose parameters are those of the groups themselves, as `spec.gradient` says."""
        grads = sweeps.gradients(self, grad, groups, params, spec)
        if spec.gradient == "exact":
            self.add_range_gradient(grads, groups, params, spec, sweeps)
        return grads.weight

    def search_space(self, groups: Tensor, factors: tuple[float, ...]) -> SearchSpace:
        """Say which ranges a clip search tries for each group: by default its own, shrunk by each factor.

        Args:
            groups: the weights.
            factors: in (0, 1], the first is 1.
        """
        return SearchSpace(*group_range(groups), factors)

    def find_params(self, groups: Tensor, spec: QuantSpec, sweeps: Sweeps = REFERENCE_SWEEPS) -> QuantParams:
        """Place the grid on each group's own range, zero included (min-max)."""
        low, high = group_range(groups, sweeps)
        return self.params_from_range(low, high, spec)

    def check(self, params: QuantParams) -> None:
        """Refuse parameters that cannot be stored.

        Raises:
            WeightError: the weight had NaN or Inf.
            ScaleRangeError: a scale overflows or is subnormal in its dtype.
        """
        two_sided = params.scale_negative is not None
        check_scale(params.scale, allow_zero=two_sided)
        if params.scale_negative is not None:
            check_scale(params.scale_negative, allow_zero=True)


def group_range(groups: Tensor, sweeps: Sweeps = REFERENCE_SWEEPS) -> tuple[Tensor, Tensor]:
    """Return each group's ``min(w, 0)`` and ``max(w, 0)``, fp32 ``[..., groups]``; NaN if the group holds one."""
    low, high = sweeps.ends(groups)
    # Zero stays inside the range: a group of one sign would otherwise lose the small weights, or itself.
    return low.clamp(max=0), high.clamp(min=0)


def mean_magnitude(groups: Tensor) -> Tensor:
    """Return the mean of ``|w|`` over each group, fp32 ``[..., groups]``.

    Summed in fp64, so that no order of summation, which differs between devices, shows in the result.
    """
    total = groups.to(wide_dtype(groups), copy=True).abs_().sum(-1)
    return (total / groups.shape[-1]).float()


def wide_dtype(like: Tensor) -> torch.dtype:
    """The widest dtype that a tensor's device can sum in: fp64, except on Apple's GPUs."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def add_at_extreme(grad: Tensor, index: Tensor, value: Tensor) -> None:
    """Add `value` ``[..., groups]`` in place at position `index` ``[..., groups]`` of each group of `grad`."""
    grad.scatter_add_(-1, index.unsqueeze(-1), value.unsqueeze(-1))
