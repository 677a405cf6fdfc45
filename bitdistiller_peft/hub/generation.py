"""What `generate` is to do when a model's own choices are asked for, and not those of its generation config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig, PreTrainedModel


def stop_and_pad_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[list[int], int]:
    """The tokens that end an answer, by the model's generation config and by its tokenizer, and one to pad with."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    stops = set(configured if isinstance(configured, (list, tuple)) else [configured]) | {tokenizer.eos_token_id}
    stop_ids = sorted(int(token) for token in stops if token is not None)
    pad_id = tokenizer.pad_token_id
    return stop_ids, pad_id if pad_id is not None else (stop_ids or [0])[0]


@contextmanager
def without_generation_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Let a model speak for itself: its generation config may hold penalties, and those are not in its distribution."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def cut_at_stop(ids: list[int], stop_ids: list[int]) -> tuple[list[int], bool]:
    """End an answer behind its first stop token; what `generate` pads behind it is dropped.

    Returns:
        The tokens, the one that ended the answer included, and whether there was one.
    """
    end = next((at for at, token in enumerate(ids) if token in stop_ids), None)
    return (ids, False) if end is None else (ids[: end + 1], True)
