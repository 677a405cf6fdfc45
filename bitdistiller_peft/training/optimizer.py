"""Learning rates of their own for scales and zero points, no weight decay on either; quantizing once per step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bitdistiller_peft.layers import (
    SCALE,
    SCALE_NEGATIVE,
    SCALE_RESIDUAL,
    ZERO_POINT,
    KeptValues,
    iter_quantized,
)
from bitdistiller_peft.training.metrics import learned_companions, learned_parameters

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
        scale_lr: for scales, see `_scale_rates`; None for the optimizer's own.
        zero_point_lr: for zero points; None leaves them where they are.
    """
    usual = optimizer.param_groups[0]["lr"]
    rates = _scale_rates(model, usual if scale_lr is None else scale_lr)
    if zero_point_lr is not None:
        rates |= {id(parameter): zero_point_lr for parameter in learned_parameters(model, ZERO_POINTS)}
    for rate in sorted(set(rates.values()) - {usual}):
        for group in list(optimizer.param_groups):
            own = [parameter for parameter in group["params"] if rates.get(id(parameter)) == rate]
            if own:
                group["params"] = [parameter for parameter in group["params"] if rates.get(id(parameter)) != rate]
                optimizer.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0})


def _scale_rates(model: nn.Module, rate: float) -> dict[int, float]:
    """The rate of each learned scale, by the id of its tensor.

    An optimizer like Adam moves every scale by about its rate. That moves the outermost levels by the grid's reach
    times as much, and, counted in code steps, which are finer in proportion, by the square of it: at 8 bits 7,200 times
    as many as at 2. The given rate is that of the grid with the least reach; others are smaller, for as many steps.
    """
    scales = [(s, spec.grid.reach) for s, spec in learned_companions(model, SCALES)]
    least = min((reach for _, reach in scales), default=1.0)
    return {id(scale): rate * (least / reach) ** 2 for scale, reach in scales}


def recomputes(args: TrainingArguments) -> bool:
    """Whether forward passes are run again on the way back, under either of transformers' names for it."""
    return bool(args.gradient_checkpointing or getattr(args, "activation_checkpointing", False))


class QuantizeOnce(TrainerCallback):
    """Lets the micro-batches of an optimizer step, and the second forward of gradient checkpointing, share values."""

    def __init__(self) -> None:
        self._kept: KeptValues | None = None

    @contextmanager
    def keeping(self, trainer: Trainer) -> Iterator[None]:
        """Keep values, if a step will ask for them again and they may be kept whole; on leaving, all are freed.

        Args:
            trainer: of the student, with a `DistillConfig`.
        """
        args: Any = trainer.args
        is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        repeats = args.gradient_accumulation_steps > 1 or recomputes(args)
        if is_sharded or not repeats or not args.quantize_once:
            yield
            return
        self._kept = KeptValues({id(m): m for _, m, _, _ in iter_quantized(trainer.model)}.values())
        self._kept.start()
        try:
            yield
        finally:
            self._kept.stop()
            self._kept = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget: a checkpoint may have been loaded."""
        self._forget()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forget: the optimizer has written the weights, perhaps past their version counters, as 8-bit ones do."""
        self._forget()

    def _forget(self) -> None:
        if self._kept is not None:
            self._kept.forget()
