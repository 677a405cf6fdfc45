"""Overlays of embeddings and the heads tied to them, and the choice of the overlay for a layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from bitdistiller_peft.hub.modules import is_experts
from bitdistiller_peft.kernels import compute_dtype
from bitdistiller_peft.layers import FakeQuantWeight, forward_with, linear, quant_specs
from bitdistiller_peft.tuner.layer import BitDistillerExperts, BitDistillerLayer, BitDistillerLinear


class BitDistillerEmbedding(BitDistillerLayer):
    """Overlay of an embedding."""

    def __init__(self, base_layer: nn.Embedding) -> None:
        super().__init__(base_layer, ("weight",))
        self.in_features, self.out_features = base_layer.embedding_dim, base_layer.num_embeddings

    def _forward_quantized(self, students: dict[str, FakeQuantWeight], *args: Any, **kwargs: Any) -> Any:
        table = students["weight"](self.base_layer.weight.dtype)
        return forward_with(self.base_layer, {"weight": table}, type(self.base_layer).forward, *args, **kwargs)


class BitDistillerTiedHead(BitDistillerLayer):
    """Overlay of an output head that is tied to an embedding: it has no student of its own, but the embedding's.

    Args:
        base_layer: the head.
        embedding: the overlay of the embedding.
    """

    def __init__(self, base_layer: nn.Module, embedding: BitDistillerEmbedding) -> None:
        super().__init__(base_layer, ())
        self.out_features, self.in_features = base_layer.out_features, base_layer.in_features
        self.__dict__["embedding"] = embedding  # no child: its tensors would be counted and saved twice

    def active_student(self, name: str) -> FakeQuantWeight | None:
        """The embedding's student, or `None` where the base layer speaks for itself."""
        embedding: BitDistillerEmbedding = self.__dict__["embedding"]
        return None if self.disable_adapters else embedding.active_student(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Multiply by the embedding's fake-quantized table, or run the base layer as it is."""
        student = self.active_student("weight")
        if student is None:
            return self.base_layer(*args, **kwargs)
        (inputs,) = (*args, *kwargs.values())
        return linear(inputs, student(compute_dtype(inputs)), self.bias, quant_specs(student)["weight"], None)  # type: ignore[arg-type]


def overlay(target: nn.Module) -> BitDistillerLayer:
    """Wrap a base layer; an overlay is returned as it is."""
    if isinstance(target, BitDistillerLayer):
        return target
    if isinstance(target, nn.Embedding):
        return BitDistillerEmbedding(target)
    return BitDistillerExperts(target) if is_experts(target) else BitDistillerLinear(target)
