"""Verify a checkpoint without building the model: everything that can be said of the files alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME

from bitdistiller_peft.errors import BitDistillerError, CheckpointError, add_location
from bitdistiller_peft.hub.config import QUANT_METHOD, BitDistillerQuantConfig
from bitdistiller_peft.hub.files import check_folder, weight_files
from bitdistiller_peft.hub.header import read_json
from bitdistiller_peft.hub.manifest import MANIFEST_NAME, read_manifest, verify_files


def verify_checkpoint(folder: str | os.PathLike[str]) -> list[Path]:
    """Check every byte of the weights of a quantized checkpoint against what was written.

    Config, index and headers must fit together, nothing may lie outside of the folder, and the SHA-256 of every tensor
    must be the manifest's. This finds damage; against somebody who rewrites weights and manifest, sign the folder.

    Args:
        folder: a local checkpoint.

    Returns:
        The weight files that were verified.

    Raises:
        ChecksumError: a byte differs; file and tensor are named.
        CheckpointError: a file is missing, damaged, or not of this format.
        ConfigError: the quantization config has an entry outside its rule.
    """
    folder = Path(folder)
    check_folder(folder)
    _check_config(read_json(folder / CONFIG_NAME))
    files = weight_files(folder)
    if not (folder / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"{folder} must hold {MANIFEST_NAME}: there is none, so nothing says what the weights were. Download the "
            "model again, or load it (with a warning) and save it."
        )
    verify_files(files, mode="full")
    missing = sorted(name for name in read_manifest(folder / MANIFEST_NAME) if not (folder / name).is_file())
    if missing:
        raise CheckpointError(
            f"{MANIFEST_NAME} must list files that are there: {missing[0]!r} is not. Download the model again."
        )
    return files


def _check_config(config: dict[str, Any]) -> None:
    section = config.get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else section
    if method != QUANT_METHOD or not isinstance(section, dict):
        raise CheckpointError(
            f"{CONFIG_NAME} must have a `quantization_config` with quant_method={QUANT_METHOD!r}: got "
            f"{str(method)[:80]!r}. This is no checkpoint of bitdistiller_peft, or {CONFIG_NAME} is damaged; download "
            "it again."
        )
    try:
        BitDistillerQuantConfig.from_dict(section)
    except BitDistillerError as error:
        raise add_location(error, CONFIG_NAME) from None
