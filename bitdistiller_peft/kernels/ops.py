"""The operations that layers call; each goes to the best backend for its device."""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.kernels.backend import get_backend, needs_gradient, select_backend
from bitdistiller_peft.kernels.int8 import ternary_int8_linear
from bitdistiller_peft.kernels.reference import compute_dtype
from bitdistiller_peft.quantizers import REFERENCE_SWEEPS, QuantParams, QuantSpec, quantize
from bitdistiller_peft.quantizers import fake_quantize as reference_fake_quantize

__all__ = [
    "dequantize_packed",
    "fake_quantize",
    "packed_embedding",
    "packed_linear",
    "packed_ternary_int8_linear",
    "quantize",
]


def fake_quantize(
    weight: Tensor,
    spec: QuantSpec,
    *,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    scale_negative: Tensor | None = None,
    scale_residual: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    known: Tensor | None = None,
) -> Tensor:
    """Round a weight to the values that its codes can hold; see `bitdistiller_peft.quantizers.fake_quantize`.

    Args:
        weight: master weight ``[..., out, in]``, any floating dtype.
        spec: how to quantize.
        scale: learned scale.
        zero_point: learned (floating) or fixed (uint8) zero point.
        scale_negative: learned scale of negative weights.
        scale_residual: learned scale of the residual.
        dtype: of the values.
        known: what an earlier call returned for the same arguments.

    Returns:
        Values in `dtype`, shape of `weight`; the same on every backend.
    """
    is_plain = type(weight) in (Tensor, torch.nn.Parameter) and not weight.is_meta
    sweeps = REFERENCE_SWEEPS
    if is_plain and not torch.compiler.is_compiling():
        sweeps = get_backend(weight.device).sweeps
    return reference_fake_quantize(
        weight,
        spec,
        scale=scale,
        zero_point=zero_point,
        scale_negative=scale_negative,
        scale_residual=scale_residual,
        dtype=dtype,
        sweeps=sweeps,
        known=known,
    )


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
    return select_backend(words.device, spec, dtype).dequantize(words, params, spec, in_features, dtype)


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
    backend = select_backend(inputs.device, spec, compute_dtype(inputs))
    return backend.packed_linear(inputs, words, params, spec, bias)


def packed_ternary_int8_linear(
    inputs: Tensor, words: Tensor, params: QuantParams, spec: QuantSpec, bias: Tensor | None = None
) -> Tensor:
    """Multiply int8-quantized activations by a packed ternary weight, exactly; the same bits on every backend.

    Args:
        inputs: ``[..., in]``, any floating dtype, not yet quantized.
        words: int32 ``[out, words]``.
        params: as for `dequantize_packed`, with one scale per row or matrix, see `is_exact_product`.
        spec: how the weight was quantized.
        bias: ``[out]`` or `None`.

    Returns:
        ``[..., out]`` in the dtype of the inputs (or autocast's), differentiable as `ternary_int8_linear` is.
    """
    if not needs_gradient(inputs, bias):
        backend = select_backend(words.device, spec, torch.float32)
        out = backend.ternary_int8_linear(inputs, words, params, spec, bias)
        if out is not None:
            return out
    weight = dequantize_packed(words, params, spec, inputs.shape[-1], torch.float32)
    return ternary_int8_linear(inputs, weight, bias)


def packed_embedding(
    ids: Tensor, words: Tensor, params: QuantParams, spec: QuantSpec, in_features: int, dtype: torch.dtype
) -> Tensor:
    """Look up rows of a packed weight.

    Args:
        ids: integers, any shape.
        words: int32 ``[rows, ceil(in * bits / 32)]``.
        params: as for `dequantize_packed`.
        spec: how the weight was quantized.
        in_features: codes in a row.
        dtype: dtype of the result.

    Returns:
        ``[*ids.shape, in]``, each value rounded once from fp32.
    """
    backend = select_backend(words.device, spec, dtype)
    return backend.packed_embedding(ids, words, params, spec, in_features, dtype)
