"""FSDP2 without a launcher: one process is a group of its own, and its parameters are `DTensor`s of one part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard


@contextmanager
def process_group() -> Iterator[None]:
    """A gloo group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def shard(model: nn.Module) -> nn.Module:
    """Shard a model as accelerate does: every decoder layer, the embeddings, the last norm with the head, the rest."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    if not inner.config.tie_word_embeddings:
        fully_shard(inner.get_input_embeddings(), mesh=mesh)
        fully_shard([inner.model.norm, inner.get_output_embeddings()], mesh=mesh)
    return fully_shard(model, mesh=mesh)
