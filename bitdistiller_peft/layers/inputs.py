"""What happens to the inputs of a quantized linear layer before they are multiplied: SubLN, then int8 activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitdistiller_peft.kernels import compute_dtype, is_exact_product, ternary_int8_linear
from bitdistiller_peft.layers.sub_norm import SubLN
from bitdistiller_peft.quantizers import QuantSpec, fake_quantize_activations

INPUT_NORM = "input_norm"


@dataclass(frozen=True)
class InputSpec:
    """How a layer treats its inputs.

    Attributes:
        activation_bits: 8 for int8 activations with one scale per token, `None` for none.
        norm_eps: the `eps` of a `SubLN` in front, `None` for none.
    """

    activation_bits: int | None = None
    norm_eps: float | None = None


NO_CHANGE = InputSpec()


def attach_inputs(module: nn.Linear, inputs: InputSpec) -> None:
    """Give a layer its `SubLN` and activation width; the gains lie on the device of its weight."""
    module.activation_bits = inputs.activation_bits  # type: ignore[assignment]
    if inputs.norm_eps is not None:
        setattr(module, INPUT_NORM, SubLN(module.in_features, inputs.norm_eps, module.weight.device))


def input_norm(module: nn.Module) -> SubLN | None:
    """The `SubLN` of a packed or fake-quantized layer, or `None`."""
    norm: SubLN | None = getattr(module, INPUT_NORM, None)
    return norm


def activation_bits(module: nn.Module) -> int | None:
    """The activation width of a packed or fake-quantized layer, or `None`."""
    bits: int | None = module.__dict__.get("activation_bits")
    return bits


def normalized(module: nn.Module, input: Tensor) -> Tensor:
    """The inputs after the layer's `SubLN`, if it has one."""
    norm = input_norm(module)
    return input if norm is None else norm(input)


def weight_dtype(input: Tensor, bits: int | None) -> torch.dtype:
    """The dtype in which `linear` reads a fake-quantized weight: fp32 beside int8 activations, else the product's."""
    return compute_dtype(input) if bits is None else torch.float32


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, spec: QuantSpec, bits: int | None) -> Tensor:
    """Multiply by a fake-quantized weight, as the packed layer will.

    Args:
        input: ``[..., in]``, already normalized.
        weight: ``[out, in]``, the values that the codes stand for, in the dtype that `weight_dtype` says.
        bias: ``[out]`` or `None`.
        spec: how the weight was quantized.
        bits: activation width or `None`.

    Returns:
        ``[..., out]`` in the dtype of the inputs (or autocast's).
    """
    if bits is not None:
        if is_exact_product(spec, input.shape[-1]):
            return ternary_int8_linear(input, weight, bias)
        input = fake_quantize_activations(input)
    return F.linear(input, weight.to(compute_dtype(input)), bias)
