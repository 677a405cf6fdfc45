"""Writing and reading what the safetensors-based formats share: config.json and one file of named tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitdistiller_peft.errors import ExportError
from bitdistiller_peft.export.source import PackedSource
from bitdistiller_peft.jsonfile import read_object

WEIGHTS_NAME = "model.safetensors"


def write_config(source: PackedSource, folder: Path, changes: Mapping[str, Any]) -> None:
    """Write config.json: the model's own, with what the format says in it, and its rotation under both names."""
    config = {**_older_rotation(source.config), **source.config, **changes}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _older_rotation(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, as configs had them before transformers 5 and as most engines read them still.

    An engine that finds neither takes 10000 for a base and says nothing.
    """
    rope = dict(config.get("rope_parameters") or {})
    local = rope.get("sliding_attention")
    rope = dict(rope.get("full_attention", rope))  # Gemma 3 has a rotation for each kind of attention
    if "rope_theta" not in rope:
        return {}
    found = {"rope_theta": rope.pop("rope_theta")}
    if isinstance(local, Mapping) and "rope_theta" in local:
        found["rope_local_base_freq"] = local["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        found["rope_scaling"] = rope
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json of an exported model."""
    return read_object(folder / "config.json", "Export again.", error=ExportError)


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], format: str = "pt") -> None:
    """Write one safetensors file."""
    path = folder / WEIGHTS_NAME
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": format})
    path.chmod(0o644)  # safetensors makes it private


def _open(path: Path) -> Any:
    return safe_open(path, framework="pt")


class TensorFile:
    """An exported safetensors file, whose tensors are asked for by name; what nobody asked for can be listed."""

    def __init__(self, folder: Path) -> None:
        self._file = _open(folder / WEIGHTS_NAME)
        self.names = set(self._file.keys())
        self._asked: set[str] = set()

    def get(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Read a tensor.

        Raises:
            ExportError: it is not there, or has another dtype.
        """
        if name not in self.names:
            raise ExportError(f"the exported model must hold tensor {name!r}: it is missing. Export again.")
        self._asked.add(name)
        tensor: Tensor = self._file.get_tensor(name)
        if dtype is not None and tensor.dtype != dtype:
            raise ExportError(f"tensor {name!r} must be {dtype}: got {tensor.dtype}. Export again.")
        return tensor

    def left(self) -> Iterator[tuple[str, Tensor]]:
        """Read what nobody has asked for."""
        for name in sorted(self.names - self._asked):
            yield name, self.get(name)
