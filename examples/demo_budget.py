"""How much of everything the demo does, in full or quickly, and the settings of its training.

Measured on two CPU cores: full 14:01 minutes beside other work, 10:46 earlier (under 15), quick 3:19 (under 4).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

TRAINING: dict[str, Any] = {
    "loss_type": "cakld",
    "per_device_train_batch_size": 2,
    "packing": True,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "gamma_num_batches": 2,
    "gradient_checkpointing": False,
    "logging_steps": 4,
    "save_strategy": "no",
    "use_cpu": not torch.cuda.is_available(),
}


@dataclass(frozen=True)
class Budget:
    """Chunks to score, windows to search and to train blocks on, texts to write, steps to distil."""

    chunks: int
    clip_samples: int
    prompts: int
    new_tokens: int
    block_samples: int
    epochs: int
    steps: int


FULL = Budget(chunks=20, clip_samples=16, prompts=48, new_tokens=128, block_samples=520, epochs=1, steps=12)
QUICK = Budget(chunks=4, clip_samples=6, prompts=8, new_tokens=64, block_samples=56, epochs=2, steps=4)
