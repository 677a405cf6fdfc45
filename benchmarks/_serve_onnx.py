"""Greedy generation and logits by onnxruntime, from a folder that `export_model(..., "onnx", ...)` wrote."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]


@lru_cache(maxsize=1)
def _session(path: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _empty_cache(session: Any, batch: int) -> dict[str, Array]:
    cached = [entry for entry in session.get_inputs() if entry.name.startswith("past_key_values.")]
    return {entry.name: np.zeros((batch, entry.shape[1], 0, entry.shape[3]), np.float32) for entry in cached}


def _step(session: Any, ids: Array, cache: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Run ids ``[batch, tokens]`` behind a cache; return logits ``[batch, tokens, vocab]`` and the longer cache."""
    past = next(iter(cache.values())).shape[2]
    positions = np.arange(past, past + ids.shape[1])
    feed = {
        "input_ids": ids,
        "attention_mask": np.ones((len(ids), past + ids.shape[1]), np.int64),
        "position_ids": np.broadcast_to(positions, ids.shape),
        **cache,
    }
    taken = {entry.name for entry in session.get_inputs()}  # a model without rotary embeddings may not need positions
    found = session.run(None, {name: value for name, value in feed.items() if name in taken})
    return found[0], dict(zip(cache, found[1:], strict=True))


def logits(folder: Path, ids: Array) -> Array:
    """Logits of a whole sequence at once.

    Args:
        folder: the exported model.
        ids: int64 ``[batch, tokens]``.

    Returns:
        float32 ``[batch, tokens, vocab]``.
    """
    session = _session(str(folder / "model.onnx"))
    return _step(session, np.asarray(ids, np.int64), _empty_cache(session, len(ids)))[0]


def generate(folder: Path, prompt_ids: list[int], num_tokens: int) -> tuple[list[int], list[float], list[float]]:
    """Take the best token again and again, each step behind the cache of the last.

    Args:
        folder: the exported model.
        prompt_ids: the prompt.
        num_tokens: tokens to take.

    Returns:
        The tokens, and the log-probabilities of the best and of the second best token at each.
    """
    session = _session(str(folder / "model.onnx"))
    step, cache = np.asarray([prompt_ids], np.int64), _empty_cache(session, 1)
    ids: list[int] = []
    best: list[float] = []
    second: list[float] = []
    while len(ids) < num_tokens:
        found, cache = _step(session, step, cache)
        top = torch.from_numpy(found[0, -1]).log_softmax(-1).topk(2)
        ids.append(int(top.indices[0]))
        best.append(float(top.values[0]))
        second.append(float(top.values[1]))
        step = np.asarray([ids[-1:]], np.int64)
    return ids, best, second
