"""What measured best here: block-wise reconstruction of weights, scales and zero points, then CAKLD end to end."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from bitdistiller_peft.recipes.base import Recipe, register_recipe

WINDOWS = {"fast": 120, "balanced": 480, "max": 4096}
LENGTHS = {"fast": 64, "balanced": 128, "max": 128}
BATCHES = {"fast": 1, "balanced": 2, "max": 2}
BLOCK_RATES = {
    2: {"learning_rate": 1.5e-2, "scale_learning_rate": 1e-2},
    3: {"learning_rate": 5e-3, "scale_learning_rate": 3e-3},
}
MANY_TOKENS = {"learning_rate": 5e-3, "scale_learning_rate": 5e-3}
# at 3 bits levels lie half as far apart, and the rates of 2 bits undo what the blocks have learned
END_RATES = {
    2: {"learning_rate": 3e-4, "scale_learning_rate": 3e-4, "zero_point_learning_rate": 5e-3},
    3: {"learning_rate": 5e-5, "scale_learning_rate": 5e-5, "zero_point_learning_rate": 1e-3},
}
# 16 candidates for a range, in place of 100, which take longer than the training of `fast`
FEW_FACTORS = (1.0, 0.85, 0.7, 0.55)
SCALING = {"method": "awq", "num_samples": 16, "seq_len": 512}
# as many tokens as block by block, one short text a step: where tokens are few, more steps are better than larger ones
SMALL_STEPS = {
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
    of a window, so many different first tokens matter more than long contexts. At 3 bits, inputs are scaled first
    (AWQ), which makes no difference at 2.
    """
    width = 2 if given.get("bits", bits) == 2 else 3
    training = {**TRAINING, **(END_RATES[width] if preset == "balanced" else {}), **END_TO_END[preset]}
    blockwise = {
        "method": "blockwise",
        "num_samples": WINDOWS[preset],
        "seq_len": LENGTHS[preset],
        "batch_size": BATCHES[preset],
        "epochs": 1,
        **(MANY_TOKENS if preset == "max" else BLOCK_RATES[width]),
        **({"factors": FEW_FACTORS} if preset == "fast" else {}),
    }
    is_scaled = width > 2 and preset != "fast"
    return Recipe(
        f"best-{bits}bit",
        stages=("generate", "calibrate", "distill") if END_TO_END[preset] else ("calibrate",),
        model={"bits": bits, "grid": "int", "group_size": 64, "learn_zero_point": True},
        calibration=(SCALING, blockwise) if is_scaled else (blockwise,),
        data={"temperature": 0.7, "max_new_tokens": 128},
        training=training if END_TO_END[preset] else {},
    )


for _bits in (2, 3):
    register_recipe(f"best-{_bits}bit", partial(best, bits=_bits))
