"""The CPU backend: which calls it takes, and how they reach the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.kernels.backend import Backend, register_backend
from bitdistiller_peft.kernels.cpu import ops
from bitdistiller_peft.kernels.cpu.fake import SWEEPS
from bitdistiller_peft.kernels.cpu.library import ISAS, isa, load
from bitdistiller_peft.kernels.cpu.weights import STREAMS
from bitdistiller_peft.kernels.layout import operator_weight, reading_of
from bitdistiller_peft.kernels.reference import compute_dtype
from bitdistiller_peft.quantizers import QuantParams, QuantSpec


class CpuBackend(Backend):
    """Grids of up to 4 bits with tables, 8-bit integers; fp32, bf16 and fp16."""

    name = "cpu"
    sweeps = SWEEPS

    def is_available(self, device: torch.device) -> bool:
        """On CPUs, where the kernels could be compiled."""
        return device.type == "cpu" and load() is not None

    def supports(self, spec: QuantSpec, dtype: torch.dtype) -> bool:
        """Every registered grid with a table form."""
        return dtype in ops.DENSE_TYPES and reading_of(spec) is not None

    def details(self) -> str:
        """The instruction set in use."""
        return ISAS[isa()]

    def dequantize(
        self, words: Tensor, params: QuantParams, spec: QuantSpec, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Table look-ups, row by row; equal to the reference."""
        if words.ndim > 2:
            each = [QuantParams(*(None if t is None else t[i] for t in params)) for i in range(len(words))]  # type: ignore[arg-type]
            parts = [self.dequantize(words[i], each[i], spec, in_features, dtype) for i in range(len(words))]
            return torch.stack(parts)
        return torch.ops.bitdistiller.dequantize(words, *operator_weight(params, spec), in_features, dtype)

    def packed_linear(
        self, inputs: Tensor, words: Tensor, params: QuantParams, spec: QuantSpec, bias: Tensor | None
    ) -> Tensor:
        """Multiply with the stream, or with dense panels where there are many tokens."""
        dtype = compute_dtype(inputs)
        if inputs.dtype != dtype:
            inputs, bias = inputs.to(dtype), None if bias is None else bias.to(dtype)
        return torch.ops.bitdistiller.packed_linear(inputs, bias, words, *operator_weight(params, spec))


def release_streams() -> None:
    """Free the streams of all packed layers in this process; the next multiplication makes them again."""
    STREAMS.clear()


register_backend(CpuBackend())
