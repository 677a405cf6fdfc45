"""Ways to damage a checkpoint, byte by byte, as a broken disk, a broken tool or an attacker would."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.hub.models import WEIGHTS, edit_config, edit_tensors

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
MANIFEST = "bitdistiller.json"

Damage = Callable[[Path], None]


def read(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(file: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    file.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def on_bytes(edit: Callable[[bytes], bytes], name: str = WEIGHTS) -> Damage:
    """Rewrite the bytes of a file."""
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes())) and None  # type: ignore[func-returns-value]


def on_header(edit: Callable[[bytes], bytes], length: int | None = None) -> Damage:
    """Rewrite the header's text; its length follows unless one is given."""

    def damage(folder: Path) -> None:
        header, data = read(folder / WEIGHTS)
        write(folder / WEIGHTS, edit(json.dumps(header).encode()), data, length)

    return damage


def on_entry(name: str, **changes: Any) -> Damage:
    """Change what the header says of a tensor; `None` removes a key."""

    def damage(folder: Path) -> None:
        header, data = read(folder / WEIGHTS)
        header[name] |= changes
        header[name] = {key: value for key, value in header[name].items() if value is not None}
        write(folder / WEIGHTS, json.dumps(header).encode(), data)

    return damage


def moved(name: str, start: int, end: int) -> Damage:
    """Shift the data offsets of a tensor."""

    def damage(folder: Path) -> None:
        first, last = read(folder / WEIGHTS)[0][name]["data_offsets"]
        on_entry(name, data_offsets=[first + start, last + end])(folder)

    return damage


def on_tensor(name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> Damage:
    """Change or drop a tensor; the file itself stays well-formed, and the manifest goes."""

    def damage(folder: Path) -> None:
        from safetensors.torch import load_file

        edit_tensors(folder, {name: edit(load_file(folder / WEIGHTS)[name].clone())}, keep_manifest=True)

    return damage


def added(name: str, like: str) -> Damage:
    """Add a copy of a tensor under another name."""

    def damage(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        save_file(tensors | {name: tensors[like].clone()}, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def put(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Set one entry in the middle."""

    def edit(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return edit


def quant(**changes: Any) -> Damage:
    """Change the quantization config."""
    return lambda folder: edit_config(folder, **changes)


def model_config(**changes: Any) -> Damage:
    """Change config.json itself; `None` removes a key."""
    return on_json(CONFIG, lambda c: {k: v for k, v in (c | changes).items() if v is not None})


def on_json(name: str, edit: Callable[[Any], Any]) -> Damage:
    """Rewrite a JSON file."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(edit(content)), encoding="utf-8")

    return damage


def text(name: str, content: str) -> Damage:
    """Replace a file."""
    return lambda folder: (folder / name).write_text(content, encoding="utf-8") and None  # type: ignore[func-returns-value]


def index_with(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the weight map of the index."""
    return on_json(INDEX, lambda index: index | {"weight_map": edit(index["weight_map"])})


def manifest_with(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change the manifest's entry of the (single) weight file."""
    return on_json(MANIFEST, lambda m: m | {"files": {WEIGHTS: edit(m["files"][WEIGHTS])}})
