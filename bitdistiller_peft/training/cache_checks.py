"""What the files of a teacher cache must hold before anything in them is believed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.jsonfile import Kinds, check_entries, read_object

MANIFEST_NAME = "manifest.json"
FORMAT = "bitdistiller-teacher-cache"
FORMAT_VERSION = 1
AGAIN = "Delete the folder and call cache_teacher() again."

DIGEST_BYTES = 16
_KINDS: dict[str, Kinds] = {
    "num_shards": int,
    "layout.kind": str,
    "layout.dtype": str,
    "layout.width": int,
    "layout.vocab": int,
    "head.logit_scale": float,
    "head.logit_softcap": (float, NoneType),
    "teacher.name": str,
    "teacher.fingerprint": str,
    "teacher.is_self": bool,
    "tokenizer": (str, NoneType),
    "template": (str, NoneType),
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read what a cache is a cache of.

    Raises:
        CheckpointError: there is no manifest, or not one of ours, or an entry is not what it must be.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise CheckpointError(
            f"{folder} must hold a teacher cache: there is no {MANIFEST_NAME}. Name the output_dir of cache_teacher()."
        )
    manifest = read_object(path, AGAIN)
    kind = (manifest.get("format"), manifest.get("format_version"))
    if kind != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(f"{path} must be of format {FORMAT} {FORMAT_VERSION}: got {str(kind)[:80]}. {AGAIN}")
    check_entries(manifest, _KINDS, path, AGAIN)
    known = {name.rpartition(".")[2] for name in _KINDS if name.startswith(("layout.", "head."))}
    unknown = sorted({*manifest["layout"], *manifest["head"]} - known)
    if unknown or manifest["num_shards"] < 1 or min(manifest["layout"]["width"], manifest["layout"]["vocab"]) < 1:
        wrong = f"unknown entries {unknown[:3]}" if unknown else "a count below 1"
        raise CheckpointError(f"{path} must describe a teacher cache: got {wrong}. {AGAIN}")
    return manifest


def open_tensors(path: Path) -> Any:
    """Open a safetensors file of a cache.

    Raises:
        CheckpointError: it is none.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} must be a safetensors file: {error}. {AGAIN}") from None


def check_tensors(path: Path, file: Any, expected: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    """Compare tensors with what they must be, without reading them.

    Args:
        path: for messages.
        file: open.
        expected: dtype and shape by name.

    Raises:
        CheckpointError: one is missing, or of another dtype or shape.
    """
    names = set(file.keys())
    for name, (dtype, shape) in expected.items():
        part = file.get_slice(name) if name in names else None
        found = None if part is None else (part.get_dtype(), part.get_shape())
        if found != (_DTYPES[dtype], shape):
            raise CheckpointError(
                f"{path} must hold {name!r} as {_DTYPES[dtype]} of shape {shape}: got {found}. {AGAIN}"
            )


def read_index(path: Path, file: Any) -> tuple[list[int], list[bytes]]:
    """Where the documents of a shard begin and end, and their digests.

    Raises:
        CheckpointError: either is missing, or they do not belong together.
    """
    names = set(file.keys())
    count = file.get_slice("digests").get_shape()[0] if "digests" in names and file.get_tensor("digests").dim() else 0
    kinds = {"digests": (torch.uint8, [count, DIGEST_BYTES]), "offsets": (torch.int64, [count + 1])}
    check_tensors(path, file, kinds)
    offsets: list[int] = file.get_tensor("offsets").tolist()
    if offsets[0] != 0 or any(start >= stop for start, stop in pairwise(offsets)):
        raise CheckpointError(f"{path} must hold rising 'offsets' from 0: it does not. {AGAIN}")
    return offsets, [digest.tobytes() for digest in file.get_tensor("digests").numpy()]


_DTYPES = {
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
}
