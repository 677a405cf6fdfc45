"""`bitdistiller.json`: checksums of the weights as they were written, and their verification.

This protects against damage (a truncated download, a flipped bit, a half-finished save), not against somebody who
rewrites the file and the manifest; for that, sign the repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any, Literal

from bitdistiller_peft.errors import CheckpointError, ChecksumError
from bitdistiller_peft.hub.header import AGAIN, read_header, read_json

MANIFEST_NAME = "bitdistiller.json"
MANIFEST_VERSION = 1
_CHUNK = 1 << 24
_SUMS = {"crc32": int, "sha256": str}
_INTERRUPTED = "interrupted"


def write_manifest(folder: Path, written_by: str, *, keep: dict[str, Any] | None = None) -> Path:
    """Checksum every weight file in a folder and write the manifest, last and atomically.

    Args:
        folder: holds the weights.
        written_by: name and version of the library.
        keep: entries of further files, which are elsewhere for the moment.

    Returns:
        The path of the manifest.
    """
    files = (keep or {}) | {path.name: _describe(path) for path in sorted(folder.glob("*.safetensors"))}
    content = {"format_version": MANIFEST_VERSION, "written_by": written_by, "files": files}
    return _replace(folder / MANIFEST_NAME, content)


def write_marker(folder: Path) -> None:
    """Put a manifest into a folder that says that its files are being replaced, so that a load refuses them."""
    _replace(folder / MANIFEST_NAME, {"format_version": MANIFEST_VERSION, _INTERRUPTED: True, "files": {}})


def _replace(target: Path, content: dict[str, Any]) -> Path:
    temporary = target.with_suffix(".json.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
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
        known |= read_manifest(manifest)
    for path in paths:
        if path.name not in known:
            raise CheckpointError(f"{MANIFEST_NAME} must list {path.name}: it does not. Save the model again.")
        _verify_file(path, known[path.name], mode)
    return True


def read_manifest(path: Path) -> dict[str, Any]:
    """The files that a manifest knows, by name.

    Raises:
        CheckpointError: it cannot be read, or says that a save was interrupted.
    """
    try:
        content = read_json(path)
    except CheckpointError as error:
        raise _not_a_manifest(path, error) from None
    if content.get(_INTERRUPTED) is True:
        raise CheckpointError(
            f"{path.name} must be that of a finished save: the last one into {path.parent} was interrupted while it "
            "replaced files. Save the model again, or download it again."
        )
    try:
        _check_content(content)
    except (ValueError, KeyError, TypeError) as error:
        raise _not_a_manifest(path, error) from None
    return dict(content["files"])


def _check_content(content: dict[str, Any]) -> None:
    files = content["files"]
    if content["format_version"] != MANIFEST_VERSION or not isinstance(files, dict):
        raise ValueError(f"format_version={content['format_version']!r}")
    for entry in files.values():
        if type(entry["bytes"]) is not int or not isinstance(entry["tensors"], dict):
            raise ValueError("an entry without its size or tensors")
        for sums in (entry, *entry["tensors"].values()):
            if not all(type(sums[key]) is kind for key, kind in _SUMS.items()):
                raise ValueError("an entry without checksums")


def _not_a_manifest(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path.name} must be a manifest of version {MANIFEST_VERSION}: {str(error)[:300]} Download it again, or save "
        "the model again."
    )


def _verify_file(path: Path, expected: dict[str, Any], mode: str) -> None:
    if mode == "fast" and _checksum(path)["crc32"] == expected["crc32"]:
        return
    found = _describe(path)
    damaged = [name for name, entry in expected["tensors"].items() if found["tensors"].get(name) != entry]
    if not damaged and found == expected:
        return
    where = f"tensor {damaged[0]!r}" if damaged else "the header"
    raise ChecksumError(f"{path.name} must equal what was saved: {where} differs. {AGAIN}")


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
                raise CheckpointError(f"{path.name} ends too early. {AGAIN}")
            left -= len(chunk)
            crc = zlib.crc32(chunk, crc)
            sha.update(chunk)
    return {"crc32": crc, "sha256": sha.hexdigest()}
