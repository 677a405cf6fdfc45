"""What a model is computed in and what it is stored in, where the command is free to choose (`dtype: auto`).

As stored, but on a processor that has no instructions for 16-bit floats: there they take several times as long as fp32,
so the model is loaded in fp32, which holds every 16-bit float exactly. What is saved goes back to 16 bits, if it is
exact.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from bitdistiller_peft.cli.verb import Console, Settings

HALVES = ("bfloat16", "float16")


def stored_dtype(source: str, revision: str | None = None) -> str:
    """The dtype that a model's config names; ``"float32"`` where it names none."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, revision=revision)
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def compute_dtype(asked: str, stored: str, device: str) -> str:
    """What to load a model in.

    Args:
        asked: `dtype:` of the settings.
        stored: what the model's config names.
        device: where it will run.
    """
    if asked != "auto":
        return asked
    from bitdistiller_peft.kernels import multiplies_bf16

    is_slow = device.startswith("cpu") and stored in HALVES and not multiplies_bf16("cpu")
    return "float32" if is_slow else stored


def load_dtype(source: str, settings: Settings, device: str, revision: str | None = None) -> str:
    """What to load the model `source` in; a choice that is not the model's own is said once.

    Raises:
        OSError: there is no such model.
    """
    asked = str(settings["dtype"] or "auto")
    if asked != "auto" or not device.startswith("cpu"):
        return asked
    stored = stored_dtype(source, revision)
    chosen = compute_dtype(asked, stored, device)
    if chosen == stored:
        return asked
    _say(f"this processor has no instructions for {stored}: computing in {chosen} (dtype: {stored} keeps it).")
    return chosen


@cache
def _say(text: str) -> None:
    Console().note(text)


def restore_dtype(model: Any, stored: str) -> None:
    """Take a packed model's plain weights back to the dtype that they came in, if each of them survives that.

    Args:
        model: packed; codes, scales and zero points stay as they are.
        stored: dtype of the published model.
    """
    import torch

    from bitdistiller_peft.layers import SUFFIXES

    dtype = getattr(torch, stored)
    plain = (
        tensor
        for name, tensor in model.state_dict().items()
        if tensor.dtype.is_floating_point and not name.endswith(SUFFIXES)
    )
    if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in plain):
        model.to(dtype)
