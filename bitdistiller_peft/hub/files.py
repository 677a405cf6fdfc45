"""What a folder must look like before anything in it is believed: its config, its index, and where its weights lie.

transformers hands a quantizer the model's config before it looks for weights, so this runs first: whatever a folder
says about itself is compared with the files that are there, and nothing outside of it is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.hub.header import Entry, read_header, read_json

FORGED = "Do not use this checkpoint; get it from whoever made it."
MAX_LAYERS = 4096
MAX_SIZE = 1 << 32
_LAYERS = re.compile(r"(num|n)_(\w+_)?(layers?|blocks?)|\w+_layers|depth")
_SIZES = re.compile(r"\w+_(size|dim|rank|heads|experts|features)|d_\w+|n_\w+|num_\w+|hidden|dim")
_IMPLEMENTATIONS = re.compile(r"_?(attn|experts)_implementation\w*")
_NAME = re.compile(r"[\w.|-]{1,100}")
_LEAST_BITS = 1  # no format stores a weight in less


def weight_files(folder: Path) -> list[Path]:
    """The weight files that a load of this folder reads: the single file, or those of the index.

    Raises:
        CheckpointError: there are none, or the index is not to be trusted; see `read_index`.
    """
    single = folder / SAFE_WEIGHTS_NAME
    if single.is_file():
        return [check_place(single, folder)]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists() or index.is_symlink():
        return sorted({check_place(folder / name, folder) for name in read_index(index).values()})
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        raise CheckpointError(
            f"{folder} must hold {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}: got {others[:3]} without an index. "
            "The checkpoint is incomplete; download or save it again."
        )
    raise CheckpointError(
        f"{folder} must hold its weights as safetensors, in {SAFE_WEIGHTS_NAME}: there is no such file. Quantized "
        "weights are read from nothing else; download or save the model again."
    )


def read_index(path: Path) -> dict[str, str]:
    """The shard of every tensor.

    Raises:
        CheckpointError: the index is not what `save_pretrained` writes.
    """
    index = read_json(check_place(path, path.parent))
    names, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(names, dict) or not names or not isinstance(metadata, dict):
        raise CheckpointError(
            f"{path.name} must hold `metadata` and a `weight_map` with the file of every tensor: it does not. The "
            "file is damaged; download or save it again."
        )
    for tensor, name in names.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path.name} must name a .safetensors file in its own folder for tensor {tensor[:200]!r}: got "
                f"{str(name)[:200]!r}. {FORGED}"
            )
    return names


def check_index(folder: Path) -> None:
    """Compare an index with the headers of its shards.

    Raises:
        CheckpointError: a tensor is not in the file that the index names, or the index does not know it.
    """
    names = read_index(folder / SAFE_WEIGHTS_INDEX_NAME)
    for file in weight_files(folder):
        inside = set(read_header(file)[0])
        listed = {tensor for tensor, name in names.items() if name == file.name}
        for tensor in sorted(inside ^ listed):
            raise CheckpointError(
                f"{SAFE_WEIGHTS_INDEX_NAME} must list what {file.name} holds: tensor {tensor[:200]!r} is only in "
                f"{'the file' if tensor in inside else 'the index'}. Files of two checkpoints are mixed, or one is "
                "damaged; download the model again."
            )


def check_place(file: Path, folder: Path) -> Path:
    """Refuse a file that lies, or whose link leads, outside of its folder.

    The cache of the Hub, whose folders hold links into its own ``blobs``, is the one exception.

    Raises:
        CheckpointError: the file is elsewhere.
    """
    # `abspath` leaves links alone; where they lead is the second question
    inside = os.path.relpath(os.path.abspath(file), os.path.abspath(folder))  # noqa: PTH100
    target, home = file.resolve(), folder.resolve()
    is_cached = home.parent.name == "snapshots" or home.parent.parent.name == "snapshots"
    blobs = next((p.parent / "blobs" for p in home.parents if p.name == "snapshots"), home)
    allowed = target.is_relative_to(home) or (is_cached and target.is_relative_to(blobs))
    if inside.startswith(os.pardir) or not allowed:
        raise CheckpointError(
            f"the weights must lie in {folder}: got {file}, which is {target}. Somebody else's checkpoint has no "
            "reason for that: the index is forged, do not use it. For your own, copy the file into the folder."
        )
    return file


def check_folder(folder: Path) -> dict[str, dict[str, Entry]]:
    """Check a local checkpoint before it is loaded.

    Args:
        folder: holds ``config.json`` and weights.

    Returns:
        The headers, by file name.

    Raises:
        CheckpointError: something is missing, damaged, elsewhere, or larger than the files can be.
    """
    config = read_json(check_place(folder / CONFIG_NAME, folder))
    files = weight_files(folder)
    headers = {file.name: read_header(file)[0] for file in files}
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        check_index(folder)
    check_model_config(config, sum(map(len, headers.values())), sum(file.stat().st_size for file in files))
    return headers


def check_model_config(config: dict[str, Any], num_tensors: int = MAX_LAYERS, num_bytes: int = MAX_SIZE) -> None:
    """Refuse a model config that asks for more than its weight files can hold, or for code or files by name.

    Args:
        config: what config.json holds.
        num_tensors: tensors in the weight files.
        num_bytes: size of the weight files.

    Raises:
        CheckpointError: the entry is named.
    """
    most = min(MAX_SIZE, 8 * num_bytes // _LEAST_BITS)
    for key, value in _walk({key: value for key, value in config.items() if key != "quantization_config"}):
        if type(value) is int:
            limit = min(MAX_LAYERS, num_tensors) if _LAYERS.fullmatch(key) else most
            if value > limit and (_LAYERS.fullmatch(key) or _SIZES.fullmatch(key)):
                raise CheckpointError(
                    f"{CONFIG_NAME} must describe the weights beside it: got {key}={str(value)[:30]}, and the files "
                    f"hold {num_tensors} tensors in {num_bytes:,} bytes. Download {CONFIG_NAME} again."
                )
        elif isinstance(value, str) and _IMPLEMENTATIONS.fullmatch(key) and not _NAME.fullmatch(value):
            raise CheckpointError(
                f"{CONFIG_NAME} must not name code to run: got {key}={value[:100]!r}. {FORGED} To use such an "
                "implementation of your own choice, pass it to from_pretrained()."
            )
        elif key == "transformers_weights" and value != SAFE_WEIGHTS_NAME:
            raise CheckpointError(
                f"{CONFIG_NAME} must not name other weights: got {key}={str(value)[:100]!r}. Name the file "
                f"{SAFE_WEIGHTS_NAME}, or use shards with an index."
            )


def _walk(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every entry with its own key; those of lists have the list's. No recursion: the depth is the file's."""
    pending = [(key, tree)]
    while pending:
        key, value = pending.pop()
        yield key, value
        if isinstance(value, dict):
            pending += [(str(name), item) for name, item in value.items()]
        elif isinstance(value, list):
            pending += [(key, item) for item in value]
