"""Greedy generation and logits by OpenVINO, from a folder that `export_model(..., "openvino", ...)` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Graph:
    """A compiled graph, run behind a cache that it has returned."""

    def __init__(self, folder: Path) -> None:
        import openvino

        # as it comes: activations in int8 groups in front of low-bit weights; the rest in float32
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        model = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", settings)
        self._request = model.create_infer_request()
        self._shapes = {entry.get_any_name(): entry.get_partial_shape() for entry in model.inputs}
        self._outputs = [entry.get_any_name() for entry in model.outputs]

    def empty_cache(self) -> dict[str, Any]:
        """No tokens yet."""
        names = [name for name in self._shapes if name.startswith("past_key_values.")]
        sizes = {name: [self._shapes[name][axis].get_length() for axis in (1, 3)] for name in names}
        return {name: np.zeros((1, heads, 0, width), np.float32) for name, (heads, width) in sizes.items()}

    def step(self, ids: list[int], cache: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Run ids behind a cache; return logits ``[tokens, vocabulary]`` and the longer cache."""
        past = next(iter(cache.values())).shape[2]
        feed = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, past + len(ids)), np.int64),
            "position_ids": np.arange(past, past + len(ids))[None],
        }
        self._request.infer({name: feed.get(name, cache.get(name)) for name in self._shapes})
        found = {name: self._request.get_tensor(name).data.copy() for name in self._outputs}
        longer = {name: found[name.replace("past_key_values.", "present.")] for name in cache}
        return torch.from_numpy(found["logits"][0]), longer
