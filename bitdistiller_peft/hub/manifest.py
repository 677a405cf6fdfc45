"""`bitdistiller.json`: checksums of the weights as they were written, and their verification.

This protects against damage (a truncated download, a flipped bit, a half-finished save), not against somebody who
rewrites the file and the manifest; for that, sign the repository.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any, Literal

from bitdistiller_peft.errors import CheckpointError, ChecksumError

MANIFEST_NAME = "bitdistiller.json"
MANIFEST_VERSION = 1
_CHUNK = 1 << 24
_MAX_HEADER = 100_000_000


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Read the header of a safetensors file.

    Returns:
        Entries ``{name: {"dtype", "shape", "data_offsets"}}`` and the offset in bytes where the data starts.

    Raises:
        CheckpointError: the file is shorter than its header says, or the header is not what safetensors writes.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise CheckpointError(f"{path.name} must be a safetensors file: got a header of {length} bytes. {_AGAIN}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path.name} must have a readable header: {error}. {_AGAIN}") from None
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if 8 + length + end != size:
        raise CheckpointError(f"{path.name} must be {8 + length + end} bytes long: got {size}. {_AGAIN}")
    return entries, 8 + length


_AGAIN = "The file is damaged; download or save it again."


def write_manifest(folder: Path, written_by: str) -> Path:
    """Checksum every weight file in a folder and write the manifest, last and atomically.

    Returns:
        The path of the manifest.
    """
    files = {path.name: _describe(path) for path in sorted(folder.glob("*.safetensors"))}
    content = {"format_version": MANIFEST_VERSION, "written_by": written_by, "files": files}
    target = folder / MANIFEST_NAME
    temporary = target.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(target)
    return target


def verify_files(paths: list[Path], *, mode: Literal["fast", "full"] = "fast") -> bool:
    """Compare weight files with the manifest beside them.

    Args:
        paths: safetensors files of one checkpoint.
        mode: ``"fast"`` compares a CRC-32 per file, ``"full"`` a SHA-256 per tensor and per file.

    Returns:
        `True` if all were checked, `False` if there is no manifest.

    Raises:
        ChecksumError: a file, named together with its first damaged tensor, differs from what was written.
        CheckpointError: the manifest does not know the file, or cannot be read.
    """
    manifests = {path.parent / MANIFEST_NAME for path in paths}
    if not all(manifest.is_file() for manifest in manifests):
        return False
    known: dict[str, Any] = {}
    for manifest in manifests:
        known |= _read_manifest(manifest)
    for path in paths:
        if path.name not in known:
            raise CheckpointError(f"{MANIFEST_NAME} must list {path.name}: it does not. Save the model again.")
        _verify_file(path, known[path.name], mode)
    return True


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = content["files"]
        if content["format_version"] != MANIFEST_VERSION or not isinstance(files, dict):
            raise ValueError(f"format_version={content['format_version']!r}")
        for entry in files.values():
            if not isinstance(entry["crc32"], int) or not isinstance(entry["tensors"], dict):
                raise ValueError("an entry without checksums")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path.name} must be a manifest of version {MANIFEST_VERSION}: {error!r}.") from None
    return dict(files)


def _verify_file(path: Path, expected: dict[str, Any], mode: str) -> None:
    if mode == "fast" and _checksum(path)["crc32"] == expected["crc32"]:
        return
    found = _describe(path)
    damaged = [name for name, entry in expected["tensors"].items() if found["tensors"].get(name) != entry]
    if not damaged and found == expected:
        return
    where = f"tensor {damaged[0]!r}" if damaged else "the header"
    raise ChecksumError(f"{path.name} must equal what was saved: {where} differs. {_AGAIN}")


def _describe(path: Path) -> dict[str, Any]:
    entries, start = read_header(path)
    tensors = {
        name: _checksum(path, start + entry["data_offsets"][0], start + entry["data_offsets"][1])
        for name, entry in sorted(entries.items())
    }
    return {**_checksum(path), "bytes": path.stat().st_size, "tensors": tensors}


def _checksum(path: Path, start: int = 0, end: int | None = None) -> dict[str, Any]:
    """CRC-32 and SHA-256 of a range of bytes."""
    crc, sha = 0, hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        left = (path.stat().st_size if end is None else end) - start
        while left > 0:
            chunk = file.read(min(_CHUNK, left))
            if not chunk:
                raise CheckpointError(f"{path.name} ends too early. {_AGAIN}")
            left -= len(chunk)
            crc = zlib.crc32(chunk, crc)
            sha.update(chunk)
    return {"crc32": crc, "sha256": sha.hexdigest()}
