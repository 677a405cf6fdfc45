"""The CPU backend: which calls it takes, and how they reach the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.kernels.backend import register_backend
from bitdistiller_peft.kernels.cpu import ops
from bitdistiller_peft.kernels.cpu.fake import SWEEPS
from bitdistiller_peft.kernels.cpu.library import ISAS, isa, load
from bitdistiller_peft.kernels.cpu.weights import STREAMS
from bitdistiller_peft.kernels.layout import Layout, reading_of
from bitdistiller_peft.kernels.operator_backend import OperatorBackend, unit_weight
from bitdistiller_peft.quantizers import QuantSpec


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

    def ternary_sums(self, codes: Tensor, words: Tensor, spec: QuantSpec) -> Tensor | None:
        """Few tokens in bf16 where the processor multiplies it: it holds 8-bit integers, and fp32 their sums."""
        if not self.is_plain_call(codes, words, None) or not ops.has_bfloat_products():
            return super().ternary_sums(codes, words, spec)
        tokens = codes.numel() // codes.shape[-1]
        if not 0 < tokens <= ops.few_tokens(torch.bfloat16):
            return super().ternary_sums(codes, words, spec)
        scale, second, *layout = unit_weight(codes.device, spec)
        out = codes.new_empty(*codes.shape[:-1], len(words))
        flat = codes.reshape(tokens, -1).bfloat16()
        return ops.stream_product(flat, out, None, words, scale, second, Layout(*layout))  # type: ignore[arg-type]

    def details(self) -> str:
        """The instruction set in use."""
        return ISAS[isa()]


def release_streams() -> None:
    """Free the streams of all packed layers in this process; the next multiplication makes them again."""
    STREAMS.clear()


register_backend(CpuBackend())
