"""The Triton backend: which calls it takes, and how they reach the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.kernels.backend import Backend, register_backend
from bitdistiller_peft.kernels.layout import operator_weight, reading_of
from bitdistiller_peft.kernels.reference import compute_dtype
from bitdistiller_peft.kernels.triton import ops
from bitdistiller_peft.kernels.triton.fake import SWEEPS
from bitdistiller_peft.quantizers import QuantParams, QuantSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonBackend(Backend):
    """Grids of up to 4 bits with tables, 8-bit integers; fp32, bf16 and fp16; codes in the plain bitstream."""

    name = "triton"
    sweeps = SWEEPS

    def is_available(self, device: torch.device) -> bool:
        """On GPUs, where Triton is installed. Its interpreter, for tests, has to be asked for by name."""
        return device.type == "cuda" and ops.is_usable(device)

    def supports(self, spec: QuantSpec, dtype: torch.dtype) -> bool:
        """Every registered grid with a table form."""
        return dtype in DTYPES and spec.packing == "bitstream" and reading_of(spec) is not None

    def dequantize(
        self, words: Tensor, params: QuantParams, spec: QuantSpec, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Tile by tile, in registers; equal to the reference."""
        if words.ndim > 2:
            each = [QuantParams(*(None if t is None else t[i] for t in params)) for i in range(len(words))]  # type: ignore[arg-type]
            parts = [self.dequantize(words[i], each[i], spec, in_features, dtype) for i in range(len(words))]
            return torch.stack(parts)
        return torch.ops.bitdistiller.triton_dequantize(words, *operator_weight(params, spec), in_features, dtype)

    def packed_linear(
        self, inputs: Tensor, words: Tensor, params: QuantParams, spec: QuantSpec, bias: Tensor | None
    ) -> Tensor:
        """Multiply with tiles made in registers, or with a dense weight where there are many tokens."""
        dtype = compute_dtype(inputs)
        if inputs.dtype != dtype:
            inputs, bias = inputs.to(dtype), None if bias is None else bias.to(dtype)
        return torch.ops.bitdistiller.triton_packed_linear(inputs, bias, words, *operator_weight(params, spec))


register_backend(TritonBackend())
