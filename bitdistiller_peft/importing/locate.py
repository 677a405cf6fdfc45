"""From what a user names to an open checkpoint: a folder, a GGUF file, or either of them on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download

from bitdistiller_peft.errors import BitDistillerError, CheckpointError, ConfigError, ForeignModelError
from bitdistiller_peft.importing.folder import read_section
from bitdistiller_peft.importing.formats import ForeignModel, get_import_format, import_format_names

GGUF = "gguf"
_WANTED = ("*.json", "*.safetensors")  # never a pickle


def open_foreign(source: str | os.PathLike[str], revision: str | None = None) -> ForeignModel:
    """Open a checkpoint of another tool.

    Raises:
        ConfigError: there is none under this name.
        ForeignModelError: a format that is not known, or a model that no grid of ours holds.
        CheckpointError: files that are missing or damaged.
    """
    path = locate(os.fspath(source), revision)
    chosen = get_import_format(format_of(path))
    chosen.check_installed()
    try:
        return chosen.open(path)
    except (OSError, RuntimeError, IndexError, OverflowError) as error:
        if isinstance(error, BitDistillerError):
            raise
        raise CheckpointError(
            f"{path.name} must be readable: {type(error).__name__}: {error}. Download it again."
        ) from error


def locate(source: str, revision: str | None) -> Path:
    """The folder or file that a source means, downloaded if it is on the Hub.

    Raises:
        ConfigError: neither here nor there.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    parts = source.split("/")
    if source.startswith((".", "/", "~")) or len(parts) < 2 or (len(parts) > 2 and path.suffix != f".{GGUF}"):
        raise ConfigError(
            f"`source` must be a folder or a .gguf file that exists, or a name on the Hub: got {source!r}. Use "
            "'user/name', or 'user/name/file.gguf'."
        )
    repo = "/".join(parts[:2])
    try:
        if len(parts) > 2:
            return Path(hf_hub_download(repo, "/".join(parts[2:]), revision=revision))
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(_WANTED)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"`source` must be a folder, or a name on the Hub that can be read: {reason}") from None


def format_of(path: Path) -> str:
    """The name of the format of a folder or file.

    Raises:
        ForeignModelError: it is not known, or nothing is quantized.
        CheckpointError: neither.
    """
    if path.is_file():
        if path.suffix == f".{GGUF}":
            return GGUF
        raise ForeignModelError(
            f"`source` must be a folder with config.json, or a .gguf file: got {path.name!r}. Pickles and single "
            "weight files are not read; download the whole model as safetensors."
        )
    if not (path / "config.json").exists() and any(path.glob(f"*.{GGUF}")):
        raise ForeignModelError(
            f"`source` must name the file where the model is GGUF: got {path.name!r} with "
            f"{sorted(file.name for file in path.glob(f'*.{GGUF}'))[:5]}. Append one of these names."
        )
    method = read_section(path).get("quant_method", "gptq" if read_section(path) else None)
    if method == "bitdistiller":
        raise ForeignModelError(
            "`source` must be quantized by another tool: got a model of this library. Load it with "
            "AutoModelForCausalLM.from_pretrained()."
        )
    known = [name for name in import_format_names() if name != GGUF]
    if method is None:
        raise ForeignModelError(
            f"`source` must be quantized by {known}: got a model without `quantization_config`. For a full-precision "
            "model, use get_bitdistiller_model()."
        )
    if method not in known:
        raise ForeignModelError(
            f"`quant_method` of the checkpoint must be one of {known}: got {str(method)[:80]!r}. Start from the model "
            "in one of these formats."
        )
    return str(method)
