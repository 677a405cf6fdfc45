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
    def add_range_gradient(self, grads: Gradients, groups: Tensor, params: QuantParams, spec: QuantSpec) -> None:
        """Add, in place, to ``grads.weight`` what reaches the extreme weights through scales taken from them."""

    def find_params(self, groups: Tensor, spec: QuantSpec) -> QuantParams:
        """Place the grid on each group's own range, zero included (min-max)."""
        low, high = group_range(groups)
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


def group_range(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return each group's ``min(w, 0)`` and ``max(w, 0)``, fp32 ``[..., groups]``; NaN if the group holds one."""
    low, high = torch.aminmax(groups, dim=-1)
    # Zero stays inside the range: a group of one sign would otherwise lose the small weights, or itself.
    return low.clamp(max=0), high.clamp(min=0)


def add_at_extreme(grad: Tensor, index: Tensor, value: Tensor) -> None:
    """Add `value` ``[..., groups]`` in place at position `index` ``[..., groups]`` of each group of `grad`."""
    grad.scatter_add_(-1, index.unsqueeze(-1), value.unsqueeze(-1))
