"""Tiny students to calibrate, and the token ids to do it on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from tests.tiny import load, save_base, token_ids

IDS = token_ids(batch=6, length=24)
# one of every kind: separate and fused projections, Conv1D, learned positions, soft-capping, sliding windows, experts
ARCHITECTURES = ("llama", "gpt2", "opt", "gemma2", "gemma3", "mixtral", "qwen3-moe")


def student(folder: Path, name: str = "llama", *, dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    """A fresh 2-bit student of a saved random model."""
    base = load(save_base(name, folder, dtype=dtype), dtype=dtype)
    return get_bitdistiller_model(base, BitDistillerConfig(**{"bits": 2, "group_size": 32, **config}))
