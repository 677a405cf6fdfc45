"""What measured best here: block-wise reconstruction of weights, scales and zero points, then gentle CAKLD."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from bitdistiller_peft.recipes.base import Recipe, register_recipe

WINDOWS = {"fast": 240, "balanced": 480, "max": 4096}
LENGTHS = {"fast": 64, "balanced": 128, "max": 128}
BATCHES = {"fast": 1, "balanced": 2, "max": 2}
STEPS = {"fast": 0, "balanced": 16, "max": 400}


def best(preset: str, given: Mapping[str, Any], *, bits: int) -> Recipe:
    """Spend most tokens block by block, on many short windows; then a few end-to-end steps at a small rate.

    `fast` has no end-to-end stage, and takes more and smaller steps. Short windows: a decoder leans on the first token
    of a window, so many different first tokens matter more than long contexts.
    """
    steps = STEPS[preset]
    return Recipe(
        f"best-{bits}bit",
        stages=("generate", "calibrate", "distill") if steps else ("calibrate",),
        model={"bits": bits, "grid": "int", "group_size": 64, "learn_zero_point": True},
        calibration=(
            {
                "method": "blockwise",
                "num_samples": WINDOWS[preset],
                "seq_len": LENGTHS[preset],
                "batch_size": BATCHES[preset],
                "epochs": 1,
                "learning_rate": 1.5e-2 if WINDOWS[preset] < 1000 else 5e-3,
                "scale_learning_rate": 1e-2 if WINDOWS[preset] < 1000 else 5e-3,
            },
        ),
        data={"temperature": 0.7, "max_new_tokens": 128},
        training={
            "loss_type": "cakld",
            "learning_rate": 1e-5,
            "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, steps // 8),
            "max_steps": steps,
            "max_length": 512,
            "packing": True,
        },
    )


for _bits in (2, 3):
    register_recipe(f"best-{_bits}bit", partial(best, bits=_bits))
