"""What a model is computed in and what it is stored in.

As stored, but on a processor that has no instructions for 16-bit floats: there they take several times as long as fp32,
so the model is loaded in fp32, which holds every 16-bit float exactly. What is saved goes back to 16 bits, if it is
exact.
"""

from __future__ import annotations

import torch
from torch import nn

from bitdistiller_peft.kernels import multiplies_bf16
from bitdistiller_peft.layers import SUFFIXES

HALVES = ("bfloat16", "float16")


def stored_dtype(source: str, revision: str | None = None) -> str:
    """The dtype that a model's config names; ``"float32"`` where it names none.

    Args:
        source: folder or name on the Hub.
        revision: branch, tag or commit on the Hub.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, revision=revision)
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def loading_dtype(stored: str, device: str) -> str:
    """What to load a model in: as it is stored, or in fp32 where that is several times as fast.

    Args:
        stored: what the model's config names.
        device: where it will run.
    """
    is_slow = device.startswith("cpu") and stored in HALVES and not multiplies_bf16("cpu")
    return "float32" if is_slow else stored


def restore_dtype(model: nn.Module, stored: str) -> None:
    """Take a packed model's plain weights back to the dtype that they came in, if each of them survives that.

    Args:
        model: packed; codes, scales and zero points stay as they are.
        stored: dtype of the published model.
    """
    dtype = getattr(torch, stored)
    plain = (
        tensor
        for name, tensor in model.state_dict().items()
        if tensor.dtype.is_floating_point and not name.endswith(SUFFIXES)
    )
    if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in plain):
        model.to(dtype)
