"""Make a quantized model save itself completely: weights, config, card, and the manifest last."""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.hub.card import write_card
from bitdistiller_peft.hub.config import BitDistillerQuantConfig
from bitdistiller_peft.hub.manifest import write_manifest
from bitdistiller_peft.hub.summary import quant_summary

if TYPE_CHECKING:  # transformers is still being imported when this module is
    from transformers import PreTrainedModel


def attach_save(model: nn.Module) -> None:
    """Let `model.save_pretrained` (and with it `push_to_hub`) also write the card and the manifest.

    The method is put on the instance: transformers offers no hook after the weights are written, and the model's class
    must stay its own, since configs and weight conversions look at it.
    """
    model.save_pretrained = types.MethodType(save_pretrained, model)  # type: ignore[assignment]


def save_pretrained(
    self: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
) -> None:
    """Save as transformers does, then the card, then ``bitdistiller.json``.

    Args:
        self: a model with packed or latent weights.
        save_directory: folder to write to.
        args: further arguments of `PreTrainedModel.save_pretrained`.
        push_to_hub: upload the folder afterwards.
        kwargs: further arguments of `PreTrainedModel.save_pretrained` and `push_to_hub`.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    folder = _check_folder(save_directory)
    if push_to_hub:
        # one path for uploads: the mixin saves to a temporary folder through this very method
        repo_id = kwargs.pop("repo_id", None) or folder.name
        upload = {key: kwargs.pop(key) for key in _UPLOAD_KEYS if key in kwargs}
        save_pretrained(self, save_directory, *args, **kwargs)
        self.push_to_hub(repo_id, **upload)
        return
    type(self).save_pretrained(self, save_directory, *args, **kwargs)
    config = self.config.quantization_config
    adapters_only = getattr(self, "_hf_peft_config_loaded", False)
    if not isinstance(config, BitDistillerQuantConfig) or adapters_only or not kwargs.get("is_main_process", True):
        return
    write_card(folder, config, quant_summary(self), str(save_directory))
    write_manifest(folder, config.written_by)


_UPLOAD_KEYS = (
    "commit_message",
    "commit_description",
    "private",
    "token",
    "revision",
    "create_pr",
    "max_shard_size",
    "tags",
)


def _check_folder(save_directory: str | os.PathLike[str]) -> Path:
    folder = Path(save_directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".bitdistiller_write_test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise CheckpointError(
            f"`save_directory` must be a folder that can be written to: got {str(save_directory)!r} "
            f"({error.strerror}). "
            "Choose another folder; the model in memory is unchanged."
        ) from None
    return folder
