"""The CPU backend: which calls it takes, and how they reach the operators."""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.errors import WeightError
from bitdistiller_peft.kernels.backend import Backend, register_backend
from bitdistiller_peft.kernels.cpu import ops
from bitdistiller_peft.kernels.cpu.fake import SWEEPS
from bitdistiller_peft.kernels.cpu.library import ISAS, isa, load
from bitdistiller_peft.kernels.cpu.tables import grid_key, table_form
from bitdistiller_peft.kernels.cpu.weights import STREAMS
from bitdistiller_peft.kernels.reference import compute_dtype
from bitdistiller_peft.quantizers import QuantParams, QuantSpec

MAX_READINGS = 4096
Reading = tuple[str | None, tuple[str, int, int, str]]
_readings: dict[int, tuple[QuantSpec, Reading | None]] = {}


class CpuBackend(Backend):
    """Grids of up to 4 bits with tables, 8-bit integers; fp32, bf16 and fp16."""

    name = "cpu"
    sweeps = SWEEPS

    def is_available(self, device: torch.device) -> bool:
        """On CPUs, where the kernels could be compiled."""
        return device.type == "cpu" and load() is not None

    def supports(self, spec: QuantSpec, dtype: torch.dtype) -> bool:
        """Every registered grid with a table form."""
        return dtype in ops.DENSE_TYPES and _reading(spec) is not None

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
        return torch.ops.bitdistiller.dequantize(words, *_weight(params, spec), in_features, dtype)

    def packed_linear(
        self, inputs: Tensor, words: Tensor, params: QuantParams, spec: QuantSpec, bias: Tensor | None
    ) -> Tensor:
        """Multiply with the stream, or with dense panels where there are many tokens."""
        dtype = compute_dtype(inputs)
        if inputs.dtype != dtype:
            inputs, bias = inputs.to(dtype), None if bias is None else bias.to(dtype)
        return torch.ops.bitdistiller.packed_linear(inputs, bias, words, *_weight(params, spec))


def release_streams() -> None:
    """Free the streams of all packed layers in this process; the next multiplication makes them again."""
    STREAMS.clear()


@torch.compiler.assume_constant_result
def _reading(spec: QuantSpec) -> Reading | None:
    """Which of the parameters is the second one, and the plain values that an operator takes; `None`: not for us."""
    known = _readings.get(id(spec))  # hashing a spec takes longer than a small product
    if known is not None and known[0] is spec:
        return known[1]
    key = grid_key(spec.grid)
    form = None if key is None else table_form(key, spec.grid.bits)
    reading = None
    if key is not None and form is not None:
        group_size = 0 if spec.group_size == "tensor" else int(spec.group_size)
        reading = form.second, (key, spec.grid.bits, group_size, spec.packing)
    if len(_readings) > MAX_READINGS:
        _readings.clear()
    _readings[id(spec)] = spec, reading
    return reading


def _weight(params: QuantParams, spec: QuantSpec) -> tuple[Tensor, Tensor | None, str, int, int, str]:
    """What an operator takes beside the words: scale, zero points or second scale, and how to read them."""
    reading = _reading(spec)
    if reading is None:
        raise WeightError(f"the CPU kernels do not know grid={spec.grid.name!r}. Use use_backend('reference').")
    second, layout = reading
    return (params.scale, None if second is None else getattr(params, second), *layout)


register_backend(CpuBackend())
