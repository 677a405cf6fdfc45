"""Embeddings whose table is packed codes: only the rows that are looked up are ever dense.

Some models scale what they look up (Gemma) in a subclass of `nn.Embedding`. As with experts, their own forward is run,
on a stand-in that shows the rows as if they were the table.

A float table tells its model's dtype, and follows every cast. An empty parameter in front of the codes does that here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitdistiller_peft.kernels import dequantize_packed, packed_embedding
from bitdistiller_peft.layers.companions import packed_params, quant_specs, register_packed
from bitdistiller_peft.layers.experts import forward_with, with_mixin
from bitdistiller_peft.layers.packed import keep_stored_dtypes
from bitdistiller_peft.quantizers import QuantSpec

ROWS = "weight_rows"


class PackedEmbedding:
    """Mixin for an `nn.Embedding` whose weight is int32 codes.

    Its empty parameter `weight_rows` has the dtype of what is looked up; `.to(dtype)` changes that, and never scales.
    """

    @property
    def row_dtype(self) -> torch.dtype:
        """The dtype of what is looked up."""
        dtype: torch.dtype = getattr(self, ROWS).dtype
        return dtype

    def forward(self, input: Tensor) -> Tensor:
        """Look up rows for ids of any shape: ``[*ids.shape, embedding_dim]`` in `row_dtype`."""
        ids = input.reshape(-1)
        rows = packed_embedding(ids, *self._packed(), self.row_dtype)
        # the table is now as long as the ids, so a padding index may lie outside of it; it only matters in training
        shown: dict[str, Any] = {"weight": rows, "padding_idx": None}
        places = torch.arange(len(ids), device=ids.device).reshape(input.shape)
        found: Tensor = forward_with(self, shown, super().forward.__func__, places)  # type: ignore[arg-type, misc]
        return found

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense table ``[rows, embedding_dim]`` that the codes stand for."""
        return dequantize_packed(*self._packed(), dtype)

    def _packed(self) -> tuple[Tensor, Any, QuantSpec, int]:
        params = packed_params(self, "weight")  # type: ignore[arg-type]
        return self.weight, params, quant_specs(self)["weight"], self.embedding_dim  # type: ignore[attr-defined, arg-type]

    def reset_parameters(self) -> None:
        """Do nothing: codes come from packing or from a checkpoint, never from a random generator."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        return super()._apply(keep_stored_dtypes(self, fn), recurse)  # type: ignore[arg-type, misc]


def to_packed_embedding(module: nn.Module, spec: QuantSpec, tensors: dict[str, Tensor], row_dtype: torch.dtype) -> None:
    """Replace the table of an embedding by packed tensors, in place.

    Args:
        module: an `nn.Embedding`, or a subclass with a forward of its own.
        spec: how the table was quantized.
        tensors: as from `packed_tensors`.
        row_dtype: dtype of what is looked up.
    """
    with_mixin(module, PackedEmbedding)
    module._parameters.clear()
    rows = torch.empty(0, dtype=row_dtype, device=tensors[""].device)
    module.register_parameter(ROWS, nn.Parameter(rows, requires_grad=False))
    register_packed(module, "weight", spec, tensors)
