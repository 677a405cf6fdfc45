"""Run models for a score, with bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

_TILE_ELEMENTS = 1 << 24
"""Logits widened to fp32 at once: 64 MiB."""


def run(model: nn.Module, ids: Tensor) -> Tensor:
    """Compute logits `[batch, time, vocab]`, in the dtype that the model computes in.

    Args:
        model: a transformers model.
        ids: token ids `[batch, time]`, without padding.
    """
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    device = next((p.device for p in embedding.parameters()), ids.device)
    logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return logits


def progress(title: str, total: int, show: bool) -> tqdm[None]:
    """A bar that counts chunks, with the time that is left."""
    return tqdm(total=total, desc=title, unit="chunk", disable=not show)


def tiles(ids: Tensor, vocab: int) -> Iterator[tuple[int, slice]]:
    """Cut the predicting positions of a batch into pieces small enough to be widened.

    Args:
        ids: token ids `[batch, time]`.
        vocab: width of the logits.

    Yields:
        A row of the batch and a slice of its positions; the last position of a row predicts nothing and is in none.
    """
    step = max(1, _TILE_ELEMENTS // vocab)
    batch, time = ids.shape
    for row in range(batch):
        for start in range(0, time - 1, step):
            yield row, slice(start, min(start + step, time - 1))


def widened(logits: Tensor) -> Tensor:
    """The logits in fp32; a wider dtype stays."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
