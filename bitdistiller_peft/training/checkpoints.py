"""Checkpoints that a run can trust: a manifest when one is whole, and the newest whole one when a run goes on.

A folder is written file by file, so a kill, a full disk or a lost node may leave half of one. After everything else,
``bitdistiller-checkpoint.json`` is put in it, with size and CRC-32 of every file. A checkpoint with it is whole if they
agree; one without it (an older version's, or cut off) if every file can be read as what it is.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from bitdistiller_peft._version import library_version
from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.hub.atomic import write_text
from bitdistiller_peft.jsonfile import check_entries, is_of_kind, read_object, strict_json

logger = logging.getLogger(__name__)

MANIFEST_NAME = "bitdistiller-checkpoint.json"
AUTO = "auto"
_CHUNK = 1 << 24
_DELETE = "Delete this checkpoint."
_STATE = "trainer_state.json"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "pytorch_model_fsdp*", "global_step*")
_OPTIMIZER = ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*")


class CheckpointManifest(TrainerCallback):
    """Writes the manifest once every rank has written its part."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Describe the checkpoint that was just saved."""
        PartialState().wait_for_everyone()
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_manifest(folder)


def write_manifest(folder: Path) -> None:
    """Describe every file of a checkpoint, last and atomically.

    Args:
        folder: of the checkpoint.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    files = {path.relative_to(folder).as_posix(): _describe(path) for path in paths}
    content = {"format_version": 1, "written_by": f"bitdistiller_peft {library_version()}", "files": files}
    write_text(folder / MANIFEST_NAME, json.dumps(content, indent=1) + "\n")


def damage_of(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint; None if it is whole.

    Args:
        folder: of the checkpoint.
    """
    if not folder.is_dir():
        return "there is no such folder"
    manifest = folder / MANIFEST_NAME
    if not manifest.exists():
        return _unreadable(folder)
    try:
        content = read_object(manifest, _DELETE)
        check_entries(content, {"files": dict}, manifest, _DELETE)
        for name, expected in content["files"].items():
            check_entries(expected, {"bytes": int, "crc32": int}, f"{manifest}, {name[:80]!r},", _DELETE)
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
            if _describe(path) != expected:
                return f"{name} differs from what was written"
    except (CheckpointError, OSError, ValueError) as error:  # the last two: a name that can be none of a file
        return f"{MANIFEST_NAME} cannot be read: {error}"
    return None


def resumable(resume: str | bool, output_dir: str) -> str | None:
    """Choose the checkpoint that a run goes on from.

    Args:
        resume: its folder; True for the newest whole one in `output_dir`; or `"auto"` for that, or a new start where
            there is none, as after a kill before the first was written.
        output_dir: of the run.

    Returns:
        The folder; None where there is no checkpoint at all, or, with `"auto"`, no whole one.

    Raises:
        CheckpointError: the named one, or (but for `"auto"`) every one, is damaged; or the optimizer's state was not
            saved.
    """
    candidates = _newest_first(Path(output_dir))
    if resume is not True and resume != AUTO:
        folder = Path(resume)  # type: ignore[arg-type]
        fault = damage_of(folder)
        if fault is not None:
            whole = next((path for path in candidates if damage_of(path) is None), None)
            advice = f"Go on from {whole}." if whole else f"There is no whole one in {output_dir}."
            raise CheckpointError(f"`resume_from_checkpoint` must be a whole checkpoint: {folder}: {fault}. {advice}")
        _require_optimizer(folder)
        return str(folder)
    faults: list[str] = []
    for folder in candidates:
        fault = damage_of(folder)
        if fault is None:
            for line in faults:
                logger.warning("Damaged checkpoint passed over: %s. Going on from %s.", line, folder)
            _require_optimizer(folder)
            return str(folder)
        faults.append(f"{folder}: {fault}")
    if faults and resume == AUTO:
        logger.warning("No checkpoint in %s is whole: %s. Starting anew.", output_dir, "; ".join(faults))
    elif faults:
        raise CheckpointError(
            f"a checkpoint in {output_dir} must be whole: {'; '.join(faults)}. Start anew, which "
            f'resume_from_checkpoint="{AUTO}" does by itself.'
        )
    return None


def _newest_first(output_dir: Path) -> list[Path]:
    found = [(re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path) for path in output_dir.glob("*")]
    numbered = [(int(match[1]), path) for match, path in found if match is not None and path.is_dir()]
    return [path for _, path in sorted(numbered, reverse=True)]


def _require_optimizer(folder: Path) -> None:
    """Refuse to go on without optimizer and scheduler; transformers would start them anew without a word."""
    has_optimizer = any(any(folder.glob(pattern)) for pattern in _OPTIMIZER)
    missing = "scheduler.pt" if has_optimizer else "optimizer.pt"
    if not has_optimizer or not (folder / "scheduler.pt").exists():
        raise CheckpointError(
            f"`resume_from_checkpoint` must hold the optimizer's state: {folder} has no {missing} (was it saved with "
            "save_only_model=True?), and the run would not be the same. To start a new run from its weights, load them "
            "with PeftModel.from_pretrained(base, folder, is_trainable=True) and train without resume_from_checkpoint."
        )


def _unreadable(folder: Path) -> str | None:
    """The first file of a checkpoint without manifest that is missing or torn."""
    if not (folder / _STATE).is_file():
        return f"{_STATE} is missing"
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        return "the weights are missing"
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not _is_readable(path):
            return f"{path.relative_to(folder).as_posix()} cannot be read"
    return None


def _is_readable(path: Path) -> bool:
    match path.suffix:
        case ".json":
            try:
                content = strict_json(path.read_bytes(), allow_nan=True)
            except ValueError:
                return False
            return path.name != _STATE or _is_trainer_state(content)
        case ".safetensors":
            return _is_whole_safetensors(path)
        case ".pt" | ".pth" | ".bin":
            return _is_whole_zip(path)
    return True


def _is_trainer_state(content: Any) -> bool:
    """Whether transformers can take up a state where it was: it checks nothing of that itself."""
    kinds = {"global_step": int, "log_history": list}
    return isinstance(content, dict) and all(is_of_kind(content.get(key), kind) for key, kind in kinds.items())


def _is_whole_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, EOFError, OSError):
        return False


def _is_whole_safetensors(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = strict_json(file.read(length)) if length < path.stat().st_size else None
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]  # type: ignore[union-attr]
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return False
    return 8 + length + max(ends, default=0) == path.stat().st_size


def _describe(path: Path) -> dict[str, int]:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return {"bytes": path.stat().st_size, "crc32": crc}
