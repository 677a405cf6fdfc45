"""The reference backend: plain torch, right by construction, one layer's weight in memory at a time.

The dense weight of the layer at work is built tile by tile, so unpacking never needs more than a tile of temporaries;
then one ordinary `linear` multiplies. Multiplying tile by tile instead would save that one dense layer, but a BLAS may
sum in another order for another shape, and the logits would no longer equal those of the training forward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistiller_peft.kernels.backend import Backend, dequantize_stack, register_backend
from bitdistiller_peft.packing import unpack_codes, unpack_row
from bitdistiller_peft.quantizers import QuantParams, QuantSpec, dequantize

TILE_WEIGHTS = 1 << 20


class ReferenceBackend(Backend):
    """Every grid, every device."""

    name = "reference"

    def is_available(self, device: torch.device) -> bool:
        """Always."""
        return True

    def supports(self, spec: QuantSpec, dtype: torch.dtype) -> bool:
        """Everything, every layout of the codes included."""
        return True

    def dequantize(
        self, words: Tensor, params: QuantParams, spec: QuantSpec, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        """Unpack and scale row tile by row tile; each value is rounded once, from fp32 to `dtype`."""
        if words.ndim > 2:
            return dequantize_stack(self, words, params, spec, in_features, dtype)
        num_groups = spec.param_shape((1, in_features))[-1]
        weight = torch.empty(words.shape[0], in_features, dtype=dtype, device=words.device)
        tile = max(1, TILE_WEIGHTS // in_features)
        for start in range(0, words.shape[0], tile):
            rows = slice(start, start + tile)
            codes = unpack_row(words[rows], spec.grid.bits, in_features, spec.packing)
            weight[rows] = dequantize(codes, _rows(params, rows, spec, num_groups), spec).to(dtype)
        return weight

    def packed_linear(
        self, inputs: Tensor, words: Tensor, params: QuantParams, spec: QuantSpec, bias: Tensor | None
    ) -> Tensor:
        """Dequantize this one weight to the compute dtype and multiply."""
        weight = self.dequantize(words, params, spec, inputs.shape[-1], compute_dtype(inputs))
        return F.linear(inputs, weight, bias)


def compute_dtype(inputs: Tensor) -> torch.dtype:
    """The dtype a `linear` on these inputs multiplies in: autocast's where it is on, else their own."""
    device = inputs.device.type
    # a device without autocast, such as "meta", may not even be asked whether it is on
    is_on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on else inputs.dtype


def _rows(params: QuantParams, rows: slice, spec: QuantSpec, num_groups: int) -> QuantParams:
    """The parameters of some rows, zero points unpacked; a per-matrix parameter serves every row."""
    own = slice(None) if spec.group_size == "tensor" else rows
    zero_point = params.zero_point
    return QuantParams(
        params.scale[own],
        None if zero_point is None else unpack_codes(zero_point[own], spec.grid.bits, num_groups),
        None if params.scale_negative is None else params.scale_negative[own],
        None if params.scale_residual is None else params.scale_residual[own],
    )


REFERENCE = ReferenceBackend()
register_backend(REFERENCE)
