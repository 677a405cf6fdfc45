"""The forward pass that ends in a loss, not in logits.

`add_distill_forward` teaches a model's own `forward` two more keywords. With `distill=`, it runs the backbone and
computes the loss from the last hidden states and the head, token tile by token tile. With `return_hidden=True`, it
returns hidden states and head, which is all that a teacher has to say. Because both happen inside `forward`, whatever
wraps the model (PEFT, DDP, FSDP, DeepSpeed, autocast) works as for any other call.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.losses import Objective, distillation_loss, shift_labels
from bitdistiller_peft.training.heads import Head, output_head


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """What a teacher says of a batch. No tensors that autocast's wrappers would find and widen: a plain object."""

    hidden: Tensor
    """`[batch, time, width]`, after the last norm"""
    head: Head


@dataclass(frozen=True, eq=False)
class DistillTarget:
    """What the student's forward pass needs to know to compute its loss."""

    labels: Tensor
    """`[batch, time]`, not shifted"""
    objective: Objective
    teacher: HiddenStates | None = None
    tile_tokens: int | None = None


@dataclass
class DistillOutput(ModelOutput):
    """The loss summed over the target tokens, and every statistic summed alike; divide by a count of your own."""

    loss: Tensor | None = None
    sums: dict[str, Tensor] | None = None
    num_targets: int | None = None


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a `PeftModel`, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def add_distill_forward(model: PreTrainedModel) -> None:
    """Let `model.forward` take `distill=` and `return_hidden=`; without them it is what it was."""
    original = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        distill: DistillTarget | None = None,
        return_hidden: bool = False,
        **kwargs: Any,
    ) -> Any:
        if distill is None and not return_hidden:
            return original(*args, **kwargs)
        hidden = last_hidden(self, *args, **kwargs)
        head = output_head(self)
        hidden = hidden.to(head.weight.device)
        return HiddenStates(hidden, head) if distill is None else _score(hidden, head, distill)

    model.forward = types.MethodType(forward, model)


def last_hidden(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Tensor:
    """Run the backbone alone: `[batch, time, width]`."""
    for name in ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep"):
        kwargs.pop(name, None)  # of the head's business; not every backbone takes them
    kwargs |= {"use_cache": False, "return_dict": True}
    # looked up on each call: PEFT and FSDP replace modules after the forward was patched
    hidden: Tensor = model.base_model(*args, **kwargs).last_hidden_state
    return hidden


def _score(hidden: Tensor, head: Head, distill: DistillTarget) -> DistillOutput:
    teacher = distill.teacher
    output = distillation_loss(
        hidden.flatten(0, 1),
        head,
        None if teacher is None else teacher.hidden.to(hidden.device).flatten(0, 1),
        None if teacher is None else teacher.head,
        shift_labels(distill.labels.to(hidden.device)).flatten(),
        objective=distill.objective,
        tile_tokens=distill.tile_tokens,
    )
    return DistillOutput(loss=output.loss_sum, sums=output.sums(), num_targets=output.num_targets)


@torch.no_grad()
def check_forward(model: PreTrainedModel, device: torch.device) -> None:
    """Refuse an architecture whose logits are not what we make of its hidden states.

    Some models do more between backbone and logits than a projection, a scale and a cap; training them on something
    else would look healthy. Four tokens tell.

    Args:
        model: with a patched forward.
        device: where it lies.

    Raises:
        ConfigError: the logits differ.
    """
    tokens = torch.arange(4, device=device).unsqueeze(0)
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        expected = model(input_ids=tokens, use_cache=False).logits.float().cpu()
        ours = model(input_ids=tokens, return_hidden=True)
    finally:
        for module in was_training:
            module.training = True
    got = logits_of(ours).view_as(expected).cpu()
    seen = torch.isfinite(expected)
    error = (got[seen] - expected[seen]).norm() / expected[seen].norm().clamp(min=1e-9)
    if not bool(error < 0.05):  # bf16 models are off by about 0.005, a missing scale by far more
        raise ConfigError(
            f"the logits must be those of a linear head: got {type(model).__name__}, whose logits differ from ours by "
            f"{float(error):.0%}. Its scale or cap is not known here; report the architecture."
        )


def logits_of(states: HiddenStates) -> Tensor:
    """Project a few hidden states: `[tokens, vocab]` in fp32. Only for checks; a loss goes through tiles."""
    head = states.head
    bias = None if head.bias is None else head.bias.float()
    logits = nn.functional.linear(states.hidden.flatten(0, 1).float(), head.weight.float(), bias) * head.logit_scale
    cap = head.logit_softcap
    return logits if cap is None else cap * (logits / cap).tanh()
