"""The published systems, each as its paper has it; `docs/methods/` says where paper and released code differ."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from bitdistiller_peft.recipes.base import Recipe, register_recipe

CLIP_SAMPLES = {"fast": 32, "balanced": 128, "max": 512}
EPOCHS = {"fast": 1, "balanced": 4, "max": 8}


def bitdistiller(preset: str, given: Mapping[str, Any]) -> Recipe:
    """BitDistiller (arXiv 2402.10631): INT2, or NF3 where 3 bits are asked for; clip search; CAKLD on own texts.

    Min and max of each group are taken anew at every step. Norms, embeddings and head are trained too, as in the
    released code; the clip search leaves out q and k as it does. `arithmetic="released"` also takes its rounding,
    gamma, mask and reduction, with scales that are not rounded to 16 bits and prompts in the loss.
    """
    model: dict[str, Any] = {}
    training: dict[str, Any] = {}
    if given.get("arithmetic") == "released":
        model = {"scale_dtype": "float32"}
        training = {"gamma_num_batches": 11, "completion_only_loss": False}
    grid = "nf" if given.get("bits", 2) == 3 else "int"
    return Recipe(
        "bitdistiller",
        stages=("calibrate", "generate", "distill"),
        model={"bits": 2, "grid": grid, "group_size": 128, "learn_scale": False, "train_other": "all", **model},
        calibration=({"method": "clip", "num_samples": CLIP_SAMPLES[preset], "skip": ("q_proj", "k_proj")},),
        data={"temperature": 0.7, "top_p": 1.0, "max_new_tokens": 1024},
        training={
            "loss_type": "cakld",
            "learning_rate": 8e-6,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "max_length": 1024,
            "num_train_epochs": EPOCHS[preset],
            **training,
        },
    )


def bitnet_distillation(preset: str, given: Mapping[str, Any]) -> Recipe:
    """BitNet Distillation (arXiv 2510.13998): SubLN, ternary weights, int8 activations; pretraining; distillation.

    The weights of the loss are those for classification. The teacher is the full-precision model fine-tuned on the
    task: pass its path as `teacher`.
    """
    return Recipe(
        "bitnet-distillation",
        stages=("pretrain", "distill"),
        model={
            "bits": 2,
            "grid": "ternary",
            "group_size": "tensor",
            "gradient": "ste",
            "learn_scale": False,
            "activation_bits": 8,
            "subln": "output",
            "train_other": "all",
        },
        training={
            "loss_type": "mixture",
            "loss_weights": {"ce": 1.0, "forward_kl": 10.0},
            "attention_weight": 1e5,
            "temperature": 5.0,
            "rescale_temperature": False,
            "max_length": 512,
            "packing": False,
            "learning_rate": 5e-5,
            "warmup_steps": 0.05,
            "num_train_epochs": {"fast": 1, "balanced": 3, "max": 6}[preset],
        },
        stage_training={
            "pretrain": {
                "loss_type": "ce",
                "loss_weights": None,
                "attention_weight": 0.0,
                "temperature": 1.0,
                "packing": True,
                "num_train_epochs": 1,
            }
        },
    )


def afpq(preset: str, given: Mapping[str, Any], *, grid: str, bits: int) -> Recipe:
    """AFPQ (arXiv 2311.01792): a scale for each sign of a floating-point or NormalFloat grid; nothing is trained."""
    return Recipe(
        f"afpq-{grid}{bits}",
        stages=("calibrate",),
        model={"bits": bits, "grid": grid, "group_size": 128},
        calibration=({"method": "clip", "num_samples": CLIP_SAMPLES[preset]},),
    )


def r2q(preset: str, given: Mapping[str, Any]) -> Recipe:
    """R2Q (arXiv 2511.21736): two residual signs, trained on text that the teacher writes.

    The paper's equations and hyper-parameters could not be read in full; objective and rates are our choice.
    """
    return Recipe(
        "r2q",
        stages=("generate", "distill"),
        model={"bits": 2, "grid": "r2q", "group_size": 128},
        data={"temperature": 0.7, "max_new_tokens": 512},
        training={
            "loss_type": "forward_kl",
            "learning_rate": 2e-5,
            "warmup_steps": 0.05,
            "lr_scheduler_type": "cosine",
            "max_length": 1024,
            "num_train_epochs": EPOCHS[preset],
        },
    )


register_recipe("bitdistiller", bitdistiller)
register_recipe("bitnet-distillation", bitnet_distillation)
register_recipe("r2q", r2q)
for _grid, _bits in (("nf", 3), ("nf", 4), ("fp", 3), ("fp", 4)):
    register_recipe(f"afpq-{_grid}{_bits}", partial(afpq, grid=_grid, bits=_bits))
