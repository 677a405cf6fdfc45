"""Make a quantized model save itself completely or not at all: weights, config, card, and the manifest last.

Everything is written into a hidden folder inside the target and flushed to disk. Only then does it take its place: a
marker in ``bitdistiller.json`` first, which no load accepts, then file by file, then the real manifest in place of the
marker. Killed before, what was there before is untouched; killed in between, the folder is refused.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor, nn

from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.hub.atomic import sync
from bitdistiller_peft.hub.card import CARD_NAME, write_card
from bitdistiller_peft.hub.config import BitDistillerQuantConfig
from bitdistiller_peft.hub.manifest import MANIFEST_NAME, read_manifest, write_manifest, write_marker
from bitdistiller_peft.hub.summary import quant_summary
from bitdistiller_peft.hub.upload import Destination, commit_files, open_repository

if TYPE_CHECKING:  # transformers is still being imported when this module is
    from transformers import PreTrainedModel


def attach_save(model: nn.Module) -> None:
    """Let `model.save_pretrained` and `push_to_hub` also write the card and the manifest.

    The methods are put on the instance: transformers offers no hook after the weights are written, and the model's
    class must stay its own, since configs and weight conversions look at it.
    """
    model.save_pretrained = types.MethodType(save_pretrained, model)  # type: ignore[assignment]
    model.push_to_hub = types.MethodType(push_to_hub, model)  # type: ignore[assignment]


def save_pretrained(
    self: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Save as transformers does, then the card, then ``bitdistiller.json``.

    Args:
        self: a model with packed or latent weights.
        save_directory: folder to write to.
        is_main_process: whether this process writes; with several, one does.
        state_dict: what to save, if it is not `self.state_dict()`.
        push_to_hub: upload afterwards, to `repo_id` or the name of the folder.
        kwargs: further arguments of `PreTrainedModel.save_pretrained` and, for the upload, of `push_to_hub`.

    Raises:
        CheckpointError: the folder cannot be written to, or has too little room; what it held before is untouched.
    """
    folder = _check_folder(save_directory)
    if not is_main_process:
        type(self).save_pretrained(self, save_directory, is_main_process, state_dict, **kwargs)
        return
    repo_id = kwargs.pop("repo_id", None)
    upload = {key: kwargs.pop(key) for key in _UPLOAD_KEYS if push_to_hub and key in kwargs}
    with _staged(folder) as stage:
        type(self).save_pretrained(self, stage, is_main_process, state_dict, **kwargs)
        _complete(self, stage, str(save_directory), old=folder)
    if push_to_hub:
        sharding = {key: kwargs[key] for key in ("max_shard_size",) if key in kwargs}
        self.push_to_hub(repo_id or folder.name, **sharding, **upload)


COMMIT_MESSAGE = "Upload a model quantized with bitdistiller_peft"
_UPLOAD_KEYS = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


def push_to_hub(
    self: PreTrainedModel,
    repo_id: str,
    *,
    max_shard_size: int | str = "50GB",
    private: bool | None = None,
    token: str | bool | None = None,
    tags: list[str] | str | None = None,
    **kwargs: Any,
) -> Any:
    """Upload what `save_pretrained` writes. transformers' own version would replace the card by an empty one.

    Args:
        self: a model with packed or latent weights.
        repo_id: where to; the repository is created if need be. Of a card that it has already, the parts that this
            library wrote are renewed.
        max_shard_size: largest size of one file.
        private: whether a new repository is private.
        token: access token; the one on this machine by default.
        tags: tags for the card.
        kwargs: `commit_message`, `commit_description`, `revision`, `create_pr`.

    Returns:
        `CommitInfo` of huggingface_hub.

    Raises:
        HubError: the Hub refuses, or does not answer.
    """
    revision, create_pr = kwargs.pop("revision", None), kwargs.pop("create_pr", None)
    to = Destination(repo_id, branch=revision, private=private, token=token, create_pr=create_pr)
    repo = open_repository(to)
    message = kwargs.pop("commit_message", None) or COMMIT_MESSAGE
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        type(self).save_pretrained(self, folder, max_shard_size=max_shard_size)
        _complete(self, folder, repo, [tags] if isinstance(tags, str) else tags)
        files: dict[str, Path | bytes] = {file.name: file for file in sorted(folder.iterdir())}
        return commit_files(repo, files, to, message=message, description=kwargs.pop("commit_description", None))


_STAGE = re.compile(r"\.partial-(\d+)-.*")
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


def _complete(
    model: PreTrainedModel, folder: Path, location: str, tags: list[str] | None = None, *, old: Path | None = None
) -> None:
    """Write card and manifest beside the weights; a model with adapters only has saved those."""
    config = model.config.quantization_config
    if isinstance(config, BitDistillerQuantConfig) and not getattr(model, "_hf_peft_config_loaded", False):
        summary = quant_summary(model)
        write_card(folder, config, summary.with_files(folder) if config.state == "packed" else summary, location, tags)
        write_manifest(folder, config.written_by, keep={} if old is None else _still_there(old))


def _still_there(folder: Path) -> dict[str, Any]:
    """Entries of a folder's manifest for files that this save does not replace, e.g. those of a variant."""
    with contextlib.suppress(CheckpointError):
        entries = read_manifest(folder / MANIFEST_NAME)
        return {name: sums for name, sums in entries.items() if (folder / name).is_file() and not _WEIGHTS.match(name)}
    return {}


@contextlib.contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A folder to write into, whose files take their place in `folder` together, once all are on disk."""
    _sweep(folder)
    stage = Path(tempfile.mkdtemp(prefix=f".partial-{os.getpid()}-", dir=folder))
    try:
        yield stage
        for file in stage.iterdir():
            sync(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"`save_directory` must have room and stay writable: got {str(folder)!r} ({error}). Free some space or "
            "choose another folder; the model in memory is unchanged, and so is what the folder held before."
        ) from None
    else:
        _take_place(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _take_place(stage: Path, folder: Path) -> None:
    new = {file.name for file in stage.iterdir()}
    if (folder / CARD_NAME).exists():
        new.discard(CARD_NAME)  # somebody may have written it
    if MANIFEST_NAME in new:
        write_marker(folder)
        for file in folder.iterdir():
            if _WEIGHTS.fullmatch(file.name) and file.name not in new:
                file.unlink()  # transformers would load the single file of an earlier save in place of new shards
    for name in sorted(new - {MANIFEST_NAME}):
        (stage / name).replace(folder / name)
    sync(folder)
    if MANIFEST_NAME in new:
        (stage / MANIFEST_NAME).replace(folder / MANIFEST_NAME)
        sync(folder)


def _sweep(folder: Path) -> None:
    """Remove what killed saves left behind."""
    for path in folder.iterdir():
        match = _STAGE.fullmatch(path.name)
        if match and not _is_alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # where signal 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _check_folder(save_directory: str | os.PathLike[str]) -> Path:
    folder = Path(save_directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # without a name, or with one of its own: several processes may save
            pass
    except OSError as error:
        raise CheckpointError(
            f"`save_directory` must be a folder that can be written to: got {str(save_directory)!r} "
            f"({error.strerror}). "
            "Choose another folder; the model in memory is unchanged."
        ) from None
    return folder
