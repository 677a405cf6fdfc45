"""What data depend on, as short texts that can be compared: a tokenizer, its template, a teacher's weights."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import Tensor, nn

from bitdistiller_peft.layers import gathered

_SAMPLED_PER_TENSOR = 16


def sha256_of(value: Any) -> str:
    """SHA-256 of plain values.

    Args:
        value: what JSON can hold.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of the vocabulary and the special tokens."""
    return sha256_of([sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.all_special_tokens))])


def fingerprint_template(tokenizer: Any) -> str | None:
    """SHA-256 of the chat template; None without one."""
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else sha256_of(template)


def fingerprint_weights(model: nn.Module) -> str:
    """SHA-256 of names, shapes, dtypes and a few values of every full-precision weight; the same with a student around.

    Args:
        model: a model, possibly with overlays; adapters do not count.
    """
    weights = {_plain_name(name): parameter for name, parameter in model.named_parameters()}
    weights.pop("", None)
    digest = hashlib.sha256()
    for name, parameter in sorted(weights.items(), key=lambda item: item[0]):
        with gathered([parameter]):
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
            digest.update(_some_values(parameter))
    return digest.hexdigest()


def _plain_name(name: str) -> str:
    """The name that a parameter has without a student around it; empty for the student's own."""
    if ".bitdistiller_" in name or ".modules_to_save." in name:
        return ""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


def _some_values(parameter: Tensor) -> bytes:
    if parameter.is_meta or parameter.numel() == 0:
        return b""
    flat = parameter.detach().reshape(-1)
    count = min(_SAMPLED_PER_TENSOR, len(flat))
    picks = [index * (len(flat) - 1) // max(1, count - 1) for index in range(count)]
    return flat[picks].double().cpu().numpy().tobytes()
