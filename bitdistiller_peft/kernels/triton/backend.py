"""The Triton backend: which calls it takes, and how they reach the operators."""

from __future__ import annotations

import torch

from bitdistiller_peft.kernels.backend import register_backend
from bitdistiller_peft.kernels.layout import reading_of
from bitdistiller_peft.kernels.operator_backend import OperatorBackend
from bitdistiller_peft.kernels.triton import ops
from bitdistiller_peft.kernels.triton.fake import SWEEPS
from bitdistiller_peft.quantizers import QuantSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TritonBackend(OperatorBackend):
    """Grids of up to 4 bits with tables, 8-bit integers; fp32, bf16 and fp16; codes in the plain bitstream."""

    name = "triton"
    sweeps = SWEEPS
    device_type = "cuda"
    linear = torch.ops.bitdistiller.triton_packed_linear
    dense = torch.ops.bitdistiller.triton_dequantize
    direct_linear = staticmethod(ops.packed_linear)

    def is_available(self, device: torch.device) -> bool:
        """On GPUs, where Triton is installed. Its interpreter, for tests, has to be asked for by name."""
        return device.type == "cuda" and ops.is_usable(device)

    def supports(self, spec: QuantSpec, dtype: torch.dtype) -> bool:
        """Every registered grid with a table form."""
        return dtype in DTYPES and spec.packing == "bitstream" and reading_of(spec) is not None


register_backend(TritonBackend())
