"""Backends whose products are torch operators: how calls reach them, whatever the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitdistiller_peft.kernels.backend import Backend, dequantize_stack
from bitdistiller_peft.kernels.layout import operator_weight
from bitdistiller_peft.kernels.reference import compute_dtype
from bitdistiller_peft.quantizers import QuantParams, QuantSpec


class OperatorBackend(Backend):
    """Subclasses name their pair of operators, see `operators.define_pair`."""

    linear: Any
    dense: Any

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
        """Multiply in the compute dtype."""
        dtype = compute_dtype(inputs)
        if inputs.dtype != dtype:
            inputs, bias = inputs.to(dtype), None if bias is None else bias.to(dtype)
        return self.linear(inputs, bias, words, *operator_weight(params, spec))
