"""What BitDistiller's released code computes otherwise than its paper, to compare results like for like.

Used by `DistillConfig(arithmetic="released")` alone. Three things differ from the paper's equations, which are the
default: gamma is the mean of the teacher's largest probability, over all positions, and divided by one batch too few;
the mask of the loss is not shifted with the labels; and the loss is a sum over tokens and a mean over texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from bitdistiller_peft.losses import IGNORE_INDEX, shift_labels, teacher_confidence
from bitdistiller_peft.training.forward import HiddenStates

RELEASED = "released"


def released_faults(config: Any) -> list[str]:
    """What in a `DistillConfig` the released code has no form of."""
    wanted = {
        "loss_type": (config.loss_type, "cakld"),
        "ce_weight": (config.ce_weight, 0.0),
        "attention_weight": (config.attention_weight, 0.0),
        "hidden_weight": (config.hidden_weight, 0.0),
        "packing": (config.packing, False),
        "padding_free": (config.padding_free, False),
    }
    faults = [
        f"`{name}` must be {value!r} with arithmetic='released': got {name}={given!r}."
        for name, (given, value) in wanted.items()
        if given != value
    ]
    if config.teacher == "cached":
        faults.append("`teacher` must see every position with arithmetic='released': got 'cached'. Use 'self'.")
    if config.gamma_num_batches < 2:
        faults.append("`gamma_num_batches` must be at least 2 with arithmetic='released': got 1. Use 11, as published.")
    return faults


def released_gamma(
    answer: Callable[[Mapping[str, Any]], HiddenStates],
    batches: Iterable[Mapping[str, Any]],
    accelerator: Accelerator,
    num_batches: int,
) -> float:
    """Add up each batch's mean largest probability, over prompt and padding too, and divide by one batch too few.

    Args:
        answer: the teacher.
        batches: this rank's share.
        accelerator: averages over ranks.
        num_batches: batches asked for; the divisor is one less, however many there are.

    Returns:
        At most ``num_batches / (num_batches - 1)``: more than 1 for a teacher that is sure.
    """
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        states = answer(batch)
        hidden = states.hidden.flatten(0, 1)
        everywhere = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
        total += float(teacher_confidence(hidden, states.head, everywhere).max_probability) / len(hidden)
    shares = accelerator.reduce((total / (num_batches - 1)).float().to(accelerator.device), reduction="mean")
    return float(shares)


def released_targets(labels: Tensor) -> Tensor:
    """Labels whose mask was not shifted with them.

    Position t counts where its own token is no padding, whatever it predicts. The divergences do not look at the label;
    what is measured beside them does: the next token, and the position's own where there is none.

    Args:
        labels: `[batch, time]`, as a collator makes them.
    """
    following = shift_labels(labels)
    following = torch.where(following == IGNORE_INDEX, labels, following)
    return torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, following)
