"""Backends whose products are torch operators: how calls reach them, whatever the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bitdistiller_peft.errors import WeightError
from bitdistiller_peft.kernels.backend import Backend, dequantize_stack, needs_gradient
from bitdistiller_peft.kernels.int8 import exact_sums, finish_sums
from bitdistiller_peft.kernels.layout import PER_MATRIX, Weight, operator_weight
from bitdistiller_peft.kernels.reference import compute_dtype
from bitdistiller_peft.quantizers import QuantParams, QuantSpec
from bitdistiller_peft.quantizers.activation import quantize_activations

ONE = torch.ones(1, 1)


def unit_weight(device: torch.device, spec: QuantSpec) -> Weight:
    """A ternary weight as an operator takes it, with one in place of its scale: its signs."""
    grid, bits, _, packing = operator_weight(QuantParams(ONE), spec)[2:]
    return ONE.to(device), None, grid, bits, PER_MATRIX, packing


class OperatorBackend(Backend):
    """Subclasses name their pair of operators, see `operators.define_pair`, and the code behind the product.

    Attributes:
        device_type: of the tensors that the code behind the operators takes.
        linear: the operator.
        dense: the operator that gives the dense weight.
        direct_linear: the code behind `linear`, called without the dispatcher where that makes no difference: it takes
            longer than a small product.
        most_tokens_summed: up to how many tokens `linear` is faster than integer products with a dense weight.
    """

    device_type: str
    linear: Any
    dense: Any
    direct_linear: Callable[..., Tensor]
    most_tokens_summed: int = 0

    def dequantize(
        self, words: Tensor, params: QuantParams, spec: QuantSpec, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """One matrix after the other; equal to the reference."""
        if words.ndim > 2:
            return dequantize_stack(self, words, params, spec, in_features, dtype)
        return self.dense(words, *operator_weight(params, spec), in_features, dtype)

    def packed_linear(
        self, inputs: Tensor, words: Tensor, params: QuantParams, spec: QuantSpec, bias: Tensor | None
    ) -> Tensor:
        """Multiply in the compute dtype.

        Raises:
            WeightError: the bias has another dtype than the inputs, and there is no autocast to settle it.
        """
        weight = operator_weight(params, spec)
        dtype = compute_dtype(inputs)
        # under autocast the operators bring it to the dtype of the inputs
        if bias is not None and bias.dtype != dtype and not torch.is_autocast_enabled(inputs.device.type):
            raise WeightError(
                f"the bias must have the dtype of the inputs: got {bias.dtype} and {inputs.dtype}. Convert one of the "
                "two, or compute under torch.autocast."
            )
        if inputs.dtype != dtype:
            inputs = inputs.to(dtype)
        return self._multiply(inputs, words, weight, bias)

    def ternary_int8_linear(
        self, inputs: Tensor, words: Tensor, params: QuantParams, spec: QuantSpec, bias: Tensor | None
    ) -> Tensor | None:
        """The product with a scale of one, or of integers: fp32 holds every sum."""
        signs = unit_weight(inputs.device, spec)
        codes, step = quantize_activations(inputs)
        if codes.numel() <= self.most_tokens_summed * codes.shape[-1]:
            sums = self._multiply(codes, words, signs, None)
        else:
            sums = exact_sums(codes, self.dense(words, *signs, codes.shape[-1], torch.bfloat16))
        return finish_sums(sums, params.scale, step, bias, compute_dtype(inputs))

    def _multiply(self, inputs: Tensor, words: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        if self.is_plain_call(inputs, words, bias):
            return type(self).direct_linear(inputs, bias, words, *weight)
        product: Tensor = self.linear(inputs, bias, words, *weight)
        return product

    def is_plain_call(self, inputs: Tensor, words: Tensor, bias: Tensor | None) -> bool:
        """Whether the operator would do nothing but call its code: no gradient, compilation, tracing or other mode."""
        if torch.compiler.is_compiling() or type(inputs) is not Tensor or type(words) not in (Tensor, Parameter):
            return False
        if not inputs.device.type == words.device.type == self.device_type:
            return False
        if needs_gradient(inputs, bias):
            return False
        is_watched = torch._C._len_torch_dispatch_stack() or torch._C._is_tracing()
        return not is_watched and torch._C._functorch.peek_interpreter_stack() is None
