"""Stop a run before a value that is not finite reaches the weights, and say what to try."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from bitdistiller_peft.errors import TrainingError


def not_finite(what: str, value: float, args: TrainingArguments, state: TrainerState) -> TrainingError:
    """Describe where a run broke and which checkpoint is left.

    Args:
        what: `"loss"` or `"gradient norm"`.
        value: NaN or Inf.
        args: of the trainer.
        state: of the trainer.
    """
    folder = Path(args.output_dir)
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    saved = f"The last checkpoint is untouched: {last}." if last else "No checkpoint was written yet."
    return TrainingError(
        f"the {what} must be finite: got {value} at step {state.global_step + 1}. Lower learning_rate (now "
        f"{args.learning_rate:g}), set max_grad_norm=1.0, or train without fp16. {saved}"
    )


class GradientGuard(TrainerCallback):
    """Looks at the gradients before every optimizer step.

    A finite loss can have a gradient that is not, and a step with it would destroy every weight, which the next
    checkpoint would then keep. fp16 is left to its loss scaler, which skips such steps, and sharded gradients are not
    gathered for this.
    """

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse the step if a gradient is not finite.

        Raises:
            TrainingError: it is not.
        """
        model: nn.Module | None = kwargs.get("model")
        if model is None or args.fp16:
            return
        grads = [p.grad for p in model.parameters() if p.grad is not None and not isinstance(p.grad, DTensor)]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        if not bool(torch.isfinite(norm)):
            raise not_finite("gradient norm", norm.item(), args, state)
