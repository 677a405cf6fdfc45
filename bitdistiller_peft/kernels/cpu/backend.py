"""The CPU backend: which calls it takes, and how they reach the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.kernels.backend import register_backend
from bitdistiller_peft.kernels.cpu import ops
from bitdistiller_peft.kernels.cpu.fake import SWEEPS
from bitdistiller_peft.kernels.cpu.library import ISAS, isa, load
from bitdistiller_peft.kernels.cpu.weights import STREAMS
from bitdistiller_peft.kernels.layout import reading_of
from bitdistiller_peft.kernels.operator_backend import OperatorBackend, unit_weight
from bitdistiller_peft.kernels.reference import compute_dtype
from bitdistiller_peft.quantizers import QuantParams, QuantSpec


class CpuBackend(OperatorBackend):
    """Grids of up to 4 bits with tables, 8-bit integers; fp32, bf16 and fp16."""

    name = "cpu"
    sweeps = SWEEPS
    device_type = "cpu"
    linear = torch.ops.bitdistiller.packed_linear
    dense = torch.ops.bitdistiller.dequantize
    direct_linear = staticmethod(ops.packed_linear)
    most_tokens_summed = 24

    def is_available(self, device: torch.device) -> bool:
        """On CPUs, where the kernels could be compiled."""
        return device.type == "cpu" and load() is not None

    def supports(self, spec: QuantSpec, dtype: torch.dtype) -> bool:
        """Every registered grid with a table form."""
        return dtype in ops.DENSE_TYPES and reading_of(spec) is not None

    def ternary_int8_linear(
        self, inputs: Tensor, words: Tensor, params: QuantParams, spec: QuantSpec, bias: Tensor | None
    ) -> Tensor | None:
        """One call, in integers."""
        is_plain = inputs.dtype == compute_dtype(inputs) and self.is_plain_call(inputs, words, bias)
        if is_plain and inputs.dtype in ops.TERNARY_TYPES and inputs.numel():
            return ops.ternary_int8_linear(inputs, bias, words, params.scale, unit_weight(inputs.device, spec))
        return super().ternary_int8_linear(inputs, words, params, spec, bias)

    def details(self) -> str:
        """The instruction set in use."""
        return ISAS[isa()]


def release_streams() -> None:
    """Free the streams of all packed layers in this process; the next multiplication makes them again."""
    STREAMS.clear()


register_backend(CpuBackend())
