"""The operations that layers call; each goes to the best backend for its device."""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.kernels.backend import get_backend
from bitdistiller_peft.quantizers import QuantParams, QuantSpec, quantize
from bitdistiller_peft.quantizers import fake_quantize as fake_quantize  # the reference is its only backend so far

__all__ = ["dequantize_packed", "fake_quantize", "packed_linear", "quantize"]


def dequantize_packed(
    words: Tensor, params: QuantParams, spec: QuantSpec, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Turn packed words into a dense weight.

    Args:
        words: int32 ``[..., out, ceil(in * bits / 32)]``.
        params: scales ``[..., out, groups]`` in their storage dtype; zero points packed along the groups, int32.
        spec: how the weight was quantized.
        in_features: codes in a row.
        dtype: dtype of the result.

    Returns:
        ``[..., out, in]``, each value rounded once from fp32.
    """
    return get_backend(words.device).dequantize(words, params, spec, in_features, dtype)


def packed_linear(
    inputs: Tensor, words: Tensor, params: QuantParams, spec: QuantSpec, bias: Tensor | None = None
) -> Tensor:
    """Multiply by a packed weight: ``inputs @ weight.T + bias``.

    Args:
        inputs: ``[..., in]``, fp32, bf16 or fp16.
        words: int32 ``[out, ceil(in * bits / 32)]``.
        params: as for `dequantize_packed`.
        spec: how the weight was quantized.
        bias: ``[out]`` or `None`.

    Returns:
        ``[..., out]``, differentiable with respect to the inputs and the bias.
    """
    return get_backend(inputs.device).packed_linear(inputs, words, params, spec, bias)
