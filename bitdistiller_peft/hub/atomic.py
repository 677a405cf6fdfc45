"""Files that are whole or not there, also after a kill or a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bitdistiller_peft.errors import CheckpointError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, which takes its place only once it is on disk.

    Args:
        path: the file; its folder must exist.
        tensors: its tensors.
        metadata: texts for its header.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written to; nothing was changed.
    """
    with _replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata=metadata)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, which takes its place only once it is on disk.

    Args:
        path: the file; its folder must exist.
        text: its content.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written to; nothing was changed.
    """
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Flush a file or folder to disk, where folders can be opened (not on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if path.is_file() or error.errno != errno.EINVAL:  # some network file systems cannot sync folders
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name to write to, which replaces `path` at the end."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path.parent} must have room and stay writable: {path.name} could not be written ({error}). Free some "
            "space and call again; what was finished before is kept."
        ) from None
