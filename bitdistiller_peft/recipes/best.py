"""What measured best here: block-wise reconstruction of weights, scales and zero points, then CAKLD end to end."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from bitdistiller_peft.recipes.base import Recipe, register_recipe

WINDOWS = {"fast": 240, "balanced": 480, "max": 4096}
LENGTHS = {"fast": 64, "balanced": 128, "max": 128}
BATCHES = {"fast": 1, "balanced": 2, "max": 2}
# as many tokens as block by block, one short text a step: where tokens are few, more steps are better than larger ones
SMALL_STEPS = {
    "learning_rate": 3e-4,
    "scale_learning_rate": 3e-4,
    "zero_point_learning_rate": 5e-3,
    "warmup_steps": 96,
    "max_steps": 480,
    "max_length": 128,
    "per_device_train_batch_size": 1,
}
END_TO_END: dict[str, dict[str, Any]] = {
    "fast": {},
    "balanced": SMALL_STEPS,
    "max": {"learning_rate": 1e-5, "warmup_steps": 50, "max_steps": 400, "max_length": 512},
}
TRAINING = {"loss_type": "cakld", "lr_scheduler_type": "cosine", "packing": True}


def best(preset: str, given: Mapping[str, Any], *, bits: int) -> Recipe:
    """Spend tokens block by block, on many short windows; then as many end to end.

    `fast` has no end-to-end stage, and takes more and smaller steps. Short windows: a decoder leans on the first token
    of a window, so many different first tokens matter more than long contexts.
    """
    end_to_end = END_TO_END[preset]
    return Recipe(
        f"best-{bits}bit",
        stages=("generate", "calibrate", "distill") if end_to_end else ("calibrate",),
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
        training=TRAINING | end_to_end if end_to_end else {},
    )


for _bits in (2, 3):
    register_recipe(f"best-{_bits}bit", partial(best, bits=_bits))
