"""Activations as 8-bit integers, one scale per token.

With ``largest = max(max|x_t|, 1e-5)`` over the features of token t:

    codes = round(x * (127 / largest))          integers from -127 to 127, half to even
    value = codes * (largest / 127)

Everything in fp32, whatever the dtype of the inputs. Source: BitNet b1.58 and BitNet Distillation (arXiv 2510.13998),
equation 3; the paper adds 1e-5 to the largest value, its released code and we take it as a floor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitdistiller_peft.errors import ConfigError

ACTIVATION_BITS = (8,)
MAX_CODE = 127
SMALLEST_RANGE = 1e-5


def check_activation_bits(bits: object) -> None:
    """Refuse widths other than those that are implemented.

    Raises:
        ConfigError: neither `None` nor 8.
    """
    if bits is not None and (isinstance(bits, bool) or bits not in ACTIVATION_BITS):
        raise ConfigError(
            f"`activation_bits` must be None or 8: got activation_bits={bits!r}. Use 8 for int8 activations with one "
            "scale per token, None to leave activations alone."
        )


def quantize_activations(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Round activations to 8-bit integers.

    Args:
        inputs: ``[..., features]``, any floating dtype.

    Returns:
        Codes ``[..., features]`` as fp32 integers from -127 to 127, and steps ``[..., 1]`` in fp32; the value of a
        code is ``code * step``. NaN stays NaN.
    """
    wide = inputs.float()
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_RANGE)
    return (wide * (MAX_CODE / largest)).round_(), largest / MAX_CODE


def fake_quantize_activations(inputs: Tensor) -> Tensor:
    """Round activations to the values that 8-bit integers can hold; the gradient passes as if nothing had been done.

    Args:
        inputs: ``[..., features]``, any floating dtype.

    Returns:
        The same shape and dtype; each value is rounded once from fp32.
    """
    values: Tensor = _StraightThrough.apply(inputs)  # type: ignore[no-untyped-call]
    return values


class _StraightThrough(torch.autograd.Function):
    """Nothing flows through the largest value (as published)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        codes, step = quantize_activations(inputs)
        return codes.mul_(step).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
