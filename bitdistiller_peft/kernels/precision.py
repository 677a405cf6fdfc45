"""Whether a machine multiplies bf16, and what is said where it does not."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)

LOAD_IN_FP32 = 'load the model with dtype="float32" (on the command line, dtype: float32).'

_SAID: set[str] = set()


def multiplies_bf16(device: str | torch.device) -> bool:
    """Whether a device has instructions that multiply bf16; without them, torch takes several times as long as in fp32.

    Args:
        device: e.g. ``"cpu"`` or ``"cuda:0"``. A processor needs AVX-512 BF16 or AMX; kinds of accelerators that are
            not known here are taken to have none.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # amx_bf16 comes with avx512_bf16
        return probe is not None and bool(probe())
    return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def warn_of_slow_bf16(device: str | torch.device, dtype: torch.dtype, remedy: str) -> None:
    """Say, once a process for each remedy, that a device is about to compute in bf16 without instructions for it.

    Args:
        device: where the work is done; only processors are looked at.
        dtype: what it is done in.
        remedy: how to have fp32 instead, as a sentence.
    """
    is_slow = dtype == torch.bfloat16 and torch.device(device).type == "cpu" and not multiplies_bf16(device)
    if is_slow and remedy not in _SAID:
        _SAID.add(remedy)
        logger.warning("This processor has no instructions for bf16, which takes several times as long: %s", remedy)
