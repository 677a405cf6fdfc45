"""Products with 8-bit activations.

Where one scale serves a whole row of ternary weights, the product is a sum of integers,

    y[t, o] = (sum_j codes[t, j] * sign[o, j]) * scale[o] * step[t] + bias[o],

and is computed as one: at most 127 times the input width, it is exact in int32, and in fp32 up to a width of 132 104
whatever the order in which a library adds. So training, packing, every backend and any integer kernel that scales in
this order (scale first, then step, in fp32, one rounding to the output dtype after the bias) agree bit for bit.

For all other grids and group sizes the activations are fake-quantized and multiplied like any others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistiller_peft.grids import TernaryGrid
from bitdistiller_peft.kernels.reference import compute_dtype
from bitdistiller_peft.quantizers import QuantSpec
from bitdistiller_peft.quantizers.activation import MAX_CODE, quantize_activations

_EXACT_IN_FP32 = 1 << 24


def is_exact_product(spec: QuantSpec, in_features: int) -> bool:
    """Whether int8 activations times this weight is a sum of integers that fp32 holds exactly."""
    one_scale = spec.group_size in ("tensor", -1, in_features)
    return isinstance(spec.grid, TernaryGrid) and one_scale and in_features * MAX_CODE <= _EXACT_IN_FP32


def ternary_int8_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply int8-quantized activations by a ternary weight, exactly.

    Args:
        inputs: ``[..., in]``, any floating dtype, not yet quantized.
        weight: fp32 ``[out, in]``, each row from ``{-scale, 0, scale}``, as `fake_quantize` or `dequantize_packed`
            give it; ``in`` at most 132 104.
        bias: ``[out]`` or `None`.

    Returns:
        ``[..., out]`` in the dtype of the inputs (or autocast's). Straight-through gradients: those of
        ``linear(values, weight, bias)`` with the quantized activation values.
    """
    dtype = compute_dtype(inputs)
    with torch.autocast(inputs.device.type, enabled=False):
        values: Tensor = _TernaryInt8.apply(inputs, weight, dtype)  # type: ignore[no-untyped-call]
        return (values if bias is None else values + bias.float()).to(dtype)


def ternary_int8_reference(codes: Tensor, step: Tensor, signs: Tensor, scale: Tensor) -> Tensor:
    """The same product from integers, accumulated in int32: what an integer kernel has to return, bit for bit.

    Args:
        codes: int8 ``[tokens, in]``.
        step: fp32 ``[tokens, 1]``.
        signs: int8 ``[out, in]``, -1, 0 or 1.
        scale: ``[out, 1]`` or ``[1, 1]``, in its storage dtype.

    Returns:
        fp32 ``[tokens, out]``, without a bias.
    """
    total = codes.to(torch.int32) @ signs.to(torch.int32).T
    return total.float() * scale.float().T * step


def exact_sums(codes: Tensor, signs: Tensor, narrow: Tensor | None = None) -> Tensor:
    """Multiply integers by signs, in int8 where that is faster.

    Args:
        codes: fp32 ``[..., in]``, integers from -127 to 127.
        signs: ``[out, in]``, -1, 0 or 1, any floating dtype.
        narrow: the codes in int8, where the caller has them.

    Returns:
        fp32 ``[..., out]``.
    """
    if codes.shape[-1] > 1 and _has_integer_product(codes.device):  # torch 2.13 gets a width of 1 wrong
        narrow = codes.to(torch.int8) if narrow is None else narrow
        return (
            torch._int_mm(narrow.reshape(-1, codes.shape[-1]), signs.to(torch.int8).T)
            .float()
            .view(*codes.shape[:-1], len(signs))
        )
    return F.linear(codes, signs.float())


def finish_sums(sums: Tensor, scale: Tensor, step: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Scale exact sums, in the declared order.

    Args:
        sums: fp32 ``[..., out]``.
        scale: ``[out, 1]`` or ``[1, 1]``, in its storage dtype.
        step: fp32 ``[..., 1]``.
        bias: ``[out]`` or `None`.
        dtype: of the result.
    """
    values = sums * scale.float().T * step
    return (values if bias is None else values + bias.float()).to(dtype)


def _has_integer_product(device: torch.device) -> bool:
    """Whether int8 matrices multiply faster than fp32 ones here: with AVX-512 VNNI, three to six times."""
    return device.type == "cpu" and torch._C._has_mkldnn and bool(torch.cpu._is_vnni_supported())


class _TernaryInt8(torch.autograd.Function):
    """Keeps the activations as int8: a quarter of what autograd would keep."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        codes, step = quantize_activations(inputs)
        narrow, scale = codes.to(torch.int8), weight.abs().amax(-1)
        ctx.save_for_backward(narrow, step, weight)
        ctx.dtypes = (inputs.dtype, dtype)
        return exact_sums(codes, weight.sign(), narrow).mul_(scale).mul_(step)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        codes, step, weight = ctx.saved_tensors
        inputs_dtype, dtype = ctx.dtypes
        needs_inputs, needs_weight, _ = ctx.needs_input_grad
        grad = grad.to(dtype)
        to_inputs = (grad @ weight.to(dtype)).to(inputs_dtype) if needs_inputs else None
        if not needs_weight:
            return to_inputs, None, None
        values = (codes * step).to(dtype)
        to_weight = grad.reshape(-1, grad.shape[-1]).T @ values.reshape(-1, values.shape[-1])
        return to_inputs, to_weight.to(weight.dtype), None
