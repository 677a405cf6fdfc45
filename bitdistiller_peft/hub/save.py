"""Make a quantized model save itself completely: weights, config, card, and the manifest last."""

from __future__ import annotations

import os
import tempfile
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.hub.card import write_card
from bitdistiller_peft.hub.config import BitDistillerQuantConfig
from bitdistiller_peft.hub.manifest import write_manifest
from bitdistiller_peft.hub.summary import quant_summary

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
        CheckpointError: the folder cannot be written to.
    """
    folder = _check_folder(save_directory)
    repo_id = kwargs.pop("repo_id", None)
    upload = {key: kwargs.pop(key) for key in _UPLOAD_KEYS if push_to_hub and key in kwargs}
    before = _identity(folder / SAFE_WEIGHTS_NAME)
    type(self).save_pretrained(self, save_directory, is_main_process, state_dict, **kwargs)
    if not is_main_process:
        return
    if before and before == _identity(folder / SAFE_WEIGHTS_NAME) and (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        # shards were written; transformers would load the single file of an earlier save in their place
        (folder / SAFE_WEIGHTS_NAME).unlink()
    _complete(self, folder, str(save_directory))
    if push_to_hub:
        sharding = {key: kwargs[key] for key in ("max_shard_size",) if key in kwargs}
        self.push_to_hub(repo_id or folder.name, **sharding, **upload)


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
        repo_id: where to; the repository is created if need be, and a card that it has already is kept.
        max_shard_size: largest size of one file.
        private: whether a new repository is private.
        token: access token; the one on this machine by default.
        tags: tags for the card.
        kwargs: `commit_message`, `commit_description`, `revision`, `create_pr`.

    Returns:
        What `HfApi.upload_folder` returns.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    kwargs.setdefault("commit_message", "Upload a model quantized with bitdistiller_peft")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        type(self).save_pretrained(self, folder, max_shard_size=max_shard_size)
        _complete(self, folder, repo_id, [tags] if isinstance(tags, str) else tags)
        keep = ["README.md"] if api.file_exists(repo_id, "README.md", revision=kwargs.get("revision")) else None
        return api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=keep, **kwargs)


def _identity(file: Path) -> tuple[int, int] | None:
    """What changes whenever a file is written anew."""
    return (file.stat().st_ino, file.stat().st_mtime_ns) if file.exists() else None


def _complete(model: PreTrainedModel, folder: Path, location: str, tags: list[str] | None = None) -> None:
    """Write card and manifest beside the weights; a model with adapters only has saved those."""
    config = model.config.quantization_config
    if isinstance(config, BitDistillerQuantConfig) and not getattr(model, "_hf_peft_config_loaded", False):
        write_card(folder, config, quant_summary(model), location, tags)
        write_manifest(folder, config.written_by)


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
