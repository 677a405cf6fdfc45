"""The operators on packed weights, ``torch.ops.bitdistiller.*``: with shapes without values, and with gradients.

Each set of kernels has its own pair, a product and the dense weight, of one schema. Since they are operators,
`torch.compile` and CUDA graphs take them as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

LIBRARY: Any = torch.library.Library("bitdistiller", "DEF")  # type: ignore[no-untyped-call]
_WEIGHT = "Tensor words, Tensor scale, Tensor? second, str grid, int bits, int group_size, str packing"


def define_pair(prefix: str = "") -> None:
    """Declare ``{prefix}packed_linear`` and ``{prefix}dequantize``; a device adds its code with `LIBRARY.impl`.

    Args:
        prefix: of both names.
    """
    linear, dequantize = f"{prefix}packed_linear", f"{prefix}dequantize"
    LIBRARY.define(f"{linear}(Tensor inputs, Tensor? bias, {_WEIGHT}) -> Tensor")
    LIBRARY.define(f"{dequantize}({_WEIGHT}, int in_features, ScalarType dtype) -> Tensor")
    torch.library.register_fake(f"bitdistiller::{linear}", _linear_shape, lib=LIBRARY)
    torch.library.register_fake(f"bitdistiller::{dequantize}", _dense_shape, lib=LIBRARY)
    backward = partial(_backward, getattr(torch.ops.bitdistiller, dequantize))
    torch.library.register_autograd(f"bitdistiller::{linear}", backward, setup_context=_keep_for_backward, lib=LIBRARY)


def _linear_shape(inputs: Tensor, bias: Tensor | None, words: Tensor, *rest: Any) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], words.shape[0])


def _dense_shape(words: Tensor, scale: Tensor, *rest: Any) -> Tensor:
    return words.new_empty(words.shape[0], rest[5], dtype=rest[6])


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, bias, words, scale, second, *layout = inputs
    ctx.save_for_backward(words, scale, second)
    ctx.layout, ctx.shape, ctx.has_bias = layout, hidden.shape, bias is not None


def _backward(dequantize: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    words, scale, second = ctx.saved_tensors
    to_inputs = to_bias = None
    if ctx.needs_input_grad[0]:
        to_inputs = grad @ dequantize(words, scale, second, *ctx.layout, ctx.shape[-1], grad.dtype)
    if ctx.has_bias and ctx.needs_input_grad[1]:
        to_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return (to_inputs, to_bias, *(None,) * 7)
