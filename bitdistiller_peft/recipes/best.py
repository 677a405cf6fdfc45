"""What measured best here: blocks reconstructed in weights, scales and zero points, then distillation end to end."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from bitdistiller_peft.recipes.base import Recipe, register_recipe

WINDOWS = {"fast": 120, "balanced": 480, "max": 2400}
LENGTH, BATCH = 64, 1
BLOCK_RATES = {
    2: {"learning_rate": 1.5e-2, "scale_learning_rate": 1e-2},
    3: {"learning_rate": 5e-3, "scale_learning_rate": 3e-3},
}
# at 3 bits levels lie half as far apart, and the rates of 2 bits undo what the blocks have learned
END_RATES = {
    2: {"learning_rate": 3e-4, "scale_learning_rate": 3e-4, "zero_point_learning_rate": 5e-3},
    3: {"learning_rate": 5e-5, "scale_learning_rate": 5e-5, "zero_point_learning_rate": 1e-3},
}
# at 2 bits a range had better be much narrower than at 3: each of its ends is tried from 1.00 down to 0.37
WIDE_FACTORS = tuple(round(1 - 0.07 * i, 2) for i in range(10))
SEARCH: dict[int, dict[str, Any]] = {2: {"factors": WIDE_FACTORS}, 3: {}}
# 16 candidates for a range, in place of 100, which take longer than the training of `fast`
FEW_FACTORS = (1.0, 0.85, 0.7, 0.55)
SCALING = {"method": "awq", "num_samples": 16, "seq_len": 512}
# three times the tokens of the blocks, one short text a step: with few tokens, more steps are better than larger ones
STEPS = {"balanced": 720, "max": 3600}
STEP = {"max_length": 128, "per_device_train_batch_size": 1}
# with few tokens, a student this far away gains nothing from the part of CAKLD that seeks modes, but something from the
# teacher's last hidden states beside its logits
OBJECTIVE = {"loss_type": "forward_kl", "hidden_weight": 1.0}
TRAINING = {**OBJECTIVE, "lr_scheduler_type": "cosine", "packing": True}


def best(preset: str, given: Mapping[str, Any], *, bits: int) -> Recipe:
    """Spend a quarter of the tokens block by block, on many short windows; then the others end to end.

    `fast` has no end-to-end stage and does not look ahead. Short windows: a decoder leans on the first token of a
    window, so many different first tokens matter more than long contexts. At 3 bits, inputs are scaled first (AWQ),
    which makes no difference at 2.
    """
    width = 2 if given.get("bits", bits) == 2 else 3
    is_fast = preset == "fast"
    training = {} if is_fast else _training(STEPS[preset], width)
    if not is_fast and given.get("teacher", "self") != "self":  # its hidden states may be of another width, or not kept
        training["hidden_weight"] = 0.0
    blockwise = {
        "method": "blockwise",
        "num_samples": WINDOWS[preset],
        "seq_len": LENGTH,
        "batch_size": BATCH,
        "epochs": 1,
        **BLOCK_RATES[width],
        **({"factors": FEW_FACTORS} if is_fast else {"look_ahead": 1, **SEARCH[width]}),
    }
    is_scaled = width > 2 and not is_fast
    grid = "int" if given.get("target") else "int_fine"  # engines other than ours know integer zero points alone
    return Recipe(
        f"best-{bits}bit",
        stages=("calibrate",) if is_fast else ("generate", "calibrate", "distill"),
        model={"bits": bits, "grid": grid, "group_size": 64, "learn_zero_point": True},
        calibration=(SCALING, blockwise) if is_scaled else (blockwise,),
        data={"temperature": 0.7, "max_new_tokens": 128},
        training=training,
    )


def _training(steps: int, width: int) -> dict[str, Any]:
    return {**TRAINING, **END_RATES[width], **STEP, "max_steps": steps, "warmup_steps": steps // 5}


for _bits in (2, 3):
    register_recipe(f"best-{_bits}bit", partial(best, bits=_bits))
