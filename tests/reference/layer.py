"""A whole quantized linear layer in fp64 for autograd to differentiate: SubLN, int8 activations, weight, product.

Every rounding is straight-through. What decides a code is computed in fp32, as its definition says, so that the codes
are the layer's; gradients are those of the exact formulas.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bitdistiller_peft.quantizers import QuantParams, QuantSpec
from tests.reference.fake_quantize import Params, formula, straight_through


class Layer(NamedTuple):
    """How a layer computes.

    Attributes:
        spec: how its weight is quantized.
        dtype: what it computes in.
        activation_bits: 8 or `None`.
        norm_eps: of its SubLN.
    """

    spec: QuantSpec
    dtype: torch.dtype
    activation_bits: int | None = None
    norm_eps: float = 1e-8


def sub_norm(inputs: Tensor, gain: Tensor, layer: Layer) -> Tensor:
    """``x / sqrt(mean(x ** 2) + eps) * gain``."""
    exact = inputs / (inputs.square().mean(-1, keepdim=True) + layer.norm_eps).sqrt() * gain
    narrow, its_gain = inputs.detach().float(), gain.detach().float()
    value = narrow * torch.rsqrt(narrow.square().mean(-1, keepdim=True) + layer.norm_eps) * its_gain
    torch.testing.assert_close(value.double(), exact.detach(), rtol=1e-5, atol=1e-7)
    return straight_through(exact, value.to(layer.dtype).double())


def int8(inputs: Tensor, layer: Layer) -> Tensor:
    """``Q8(x) = max/127 * round(127 x / max)`` for every token; the gradient is the identity."""
    narrow = inputs.detach().float()
    largest = narrow.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    codes = (narrow * (127 / largest)).round()
    return straight_through(inputs, (codes * (largest / 127)).to(layer.dtype).double())


def forward(
    inputs: Tensor,
    weight: Tensor,
    layer: Layer,
    *,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    learned: Params | None = None,
    stored: QuantParams | None = None,
) -> Tensor:
    """What the layer computes, fp64.

    Args:
        inputs: fp64 ``[..., in]``.
        weight: the master weight, fp64 ``[out, in]``.
        layer: how it computes.
        gain: of its SubLN, fp64 ``[in]``.
        bias: fp64 ``[out]``.
        learned: learned parameters, fp64, by name.
        stored: the parameters as they are stored, where none are learned.
    """
    if gain is not None:
        inputs = sub_norm(inputs, gain, layer)
    if layer.activation_bits is not None:
        inputs = int8(inputs, layer)
    values = formula(weight, layer.spec, learned, stored)
    outputs = inputs @ straight_through(values, values.detach().to(layer.dtype).double()).T
    return outputs if bias is None else outputs + bias
