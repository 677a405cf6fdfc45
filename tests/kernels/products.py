"""Packed weights for tests of kernels, and what their products have to be."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bitdistiller_peft.kernels import dequantize_packed, packed_linear, use_backend
from bitdistiller_peft.layers.companions import packed_tensors
from bitdistiller_peft.quantizers import QuantParams, QuantSpec, find_params, quantize

# of the sum of magnitudes: what fp32 additions may lose, and one rounding of the result to its dtype
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3 + 2e-6, torch.float16: 5e-4 + 2e-6}
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


class Packed(NamedTuple):
    """A weight as layers hold it, and its values in fp64."""

    words: Tensor
    params: QuantParams
    spec: QuantSpec
    width: int


def pack(weight: Tensor, spec: QuantSpec) -> Packed:
    params = find_params(weight, spec)
    tensors = packed_tensors(quantize(weight, params, spec), params, spec)
    names = {"scale": "_scale", "zero_point": "_zero_point", "scale_negative": "_scale_negative"}
    names["scale_residual"] = "_scale_residual"
    stored = QuantParams(*(tensors.get(names[field]) for field in QuantParams._fields))
    return Packed(tensors[""], stored, spec, weight.shape[1])


def weight_of(case: Packed, dtype: torch.dtype) -> Tensor:
    with use_backend("reference"):
        return dequantize_packed(case.words, case.params, case.spec, case.width, dtype)


def assert_product(
    inputs: Tensor,
    case: Packed,
    bias: Tensor | None = None,
    *,
    weight_dtype: torch.dtype | None = None,
    slack: float = 1,
) -> None:
    """Equal to fp64 on the weight in the dtype that is multiplied, up to the order of additions and one rounding.

    Args:
        inputs: ``[..., in]``.
        case: the weight.
        bias: ``[out]``.
        weight_dtype: what the weight is rounded to; `None` for the inputs' dtype.
        slack: how many times the room of one rounding.
    """
    got = packed_linear(inputs, case.words, case.params, case.spec, bias)
    assert got.dtype == inputs.dtype
    weight = weight_of(case, weight_dtype or inputs.dtype).double()
    expected, room = inputs.double() @ weight.T, inputs.double().abs() @ weight.abs().T
    if bias is not None:
        expected, room = expected + bias.double(), room + bias.double().abs()
    assert got.shape == expected.shape
    assert bool(((got.double() - expected).abs() <= slack * TOLERANCE[inputs.dtype] * room).all())
