"""Learning rates of their own for scales and zero points, and no weight decay on either."""

from __future__ import annotations

import torch
from torch import nn

from bitdistiller_peft.layers import SCALE, SCALE_NEGATIVE, SCALE_RESIDUAL, ZERO_POINT
from bitdistiller_peft.training.metrics import learned_parameters

SCALES = (SCALE, SCALE_NEGATIVE, SCALE_RESIDUAL)
ZERO_POINTS = (ZERO_POINT,)


def without_learned(model: nn.Module, names: list[str]) -> list[str]:
    """Leave scales and zero points out of the names that weight decay is for: zero means nothing to them."""
    learned = {id(parameter) for parameter in learned_parameters(model, (*SCALES, *ZERO_POINTS))}
    parameters = dict(model.named_parameters(remove_duplicate=False))  # a tied weight has two names
    return [name for name in names if id(parameters[name]) not in learned]


def split_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, scale_lr: float | None, zero_point_lr: float | None
) -> None:
    """Move scales and zero points into parameter groups with their own learning rate.

    Groups are only added at the end, so the first one, whose rate is logged, stays that of the weights.

    Args:
        optimizer: fresh, without state.
        model: the student.
        scale_lr: for scales; None leaves them where they are.
        zero_point_lr: for zero points; None leaves them where they are.
    """
    for suffixes, rate in ((SCALES, scale_lr), (ZERO_POINTS, zero_point_lr)):
        chosen = {id(parameter) for parameter in learned_parameters(model, suffixes)}
        if rate is None or not chosen:
            continue
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if id(parameter) in chosen]
            if own:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
                optimizer.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0})
