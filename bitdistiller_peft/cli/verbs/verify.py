"""`bitdistiller verify`: compare a model folder with its checksums."""

from __future__ import annotations

from typing import Any

from bitdistiller_peft.cli.folder import Folder, read_folder
from bitdistiller_peft.cli.options import Option
from bitdistiller_peft.cli.verb import Console, Positional, Settings, Verb
from bitdistiller_peft.errors import CheckpointError


def run(settings: Settings, console: Console) -> dict[str, Any]:
    """Check every weight file; without a manifest there is nothing to check, which is a failure too.

    Raises:
        ChecksumError: bytes differ from what was saved; file and tensor are named.
        CheckpointError: no model folder, no manifest, or one that does not fit the files.
    """
    folder = read_folder(settings.arguments["model"])
    is_fast = settings.arguments["fast"]
    check_bytes(folder, is_fast=is_fast)
    how = "CRC-32" if is_fast else "SHA-256"
    files = "1 file" if len(folder.files) == 1 else f"{len(folder.files)} files"
    console.say(f"{folder.path}: {files}, {len(folder.tensors)} tensors, {how} as saved")
    return {
        "folder": str(folder.path),
        "files": [file.name for file in folder.files],
        "tensors": len(folder.tensors),
        "checksum": how,
        "ok": True,
    }


def check_bytes(folder: Folder, *, is_fast: bool = False) -> None:
    """Compare every weight file of a folder with its manifest.

    Args:
        folder: packed, latent, or an adapter with a manifest.
        is_fast: a CRC-32 per file instead of a SHA-256 per tensor.

    Raises:
        ChecksumError: bytes differ.
        CheckpointError: no manifest, or one that does not fit the files.
    """
    from bitdistiller_peft.hub import MANIFEST_NAME, verify_checkpoint, verify_files

    if folder.kind in ("packed", "latent") and not is_fast:
        verify_checkpoint(folder.path)
    elif not verify_files(list(folder.files), mode="fast" if is_fast else "full"):
        raise CheckpointError(
            f"{folder.path} must hold {MANIFEST_NAME}: there is none, so nothing can be compared. Save the model with "
            "bitdistiller_peft to write it."
        )


VERB = Verb(
    "verify",
    "compare a model folder with its checksums",
    run,
    positionals=(Positional("model", "packed or latent folder"),),
    own=(Option("fast", "bool", "compare a CRC-32 per file instead of a SHA-256 per tensor", False),),
    epilog="Protects against damage, not against somebody who rewrites the manifest too. Exit code 3: it differs.",
)
