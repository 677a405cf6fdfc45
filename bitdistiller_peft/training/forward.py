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
from bitdistiller_peft.losses import (
    DistillationOutput,
    Objective,
    RelationObjective,
    SparseTeacher,
    attention_relation_loss,
    distillation_loss,
    hidden_state_loss,
    shift_labels,
)
from bitdistiller_peft.training.attention import States, capture_attention, only_capture
from bitdistiller_peft.training.heads import Head, output_head

LAST_LAYER = -1
_NAME_OF_HIDDEN = "hidden_states"


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """What a teacher says of a batch. No tensors that autocast's wrappers would find and widen: a plain object."""

    hidden: Tensor
    """`[batch, time, width]`, after the last norm"""
    head: Head
    attention: States | None = None
    """queries, keys and values of the layer that was listened to"""
    layer: Tensor | None = None
    """`[batch, time, width]`, after the layer that was asked for"""


@dataclass(frozen=True, eq=False)
class SparseStates:
    """What a teacher says of a batch where only its likeliest tokens were kept."""

    known: SparseTeacher
    """of `[batch, time]` positions"""

    def flat(self, device: torch.device) -> SparseTeacher:
        """One row per token, on a device."""
        known = self.known
        parts = (known.tokens.flatten(0, 1), known.log_probs.flatten(0, 1), known.log_tail.flatten(0, 1))
        return SparseTeacher(*(part.to(device) for part in parts))


@dataclass(frozen=True)
class RelationTarget:
    """Which of the student's layers is listened to, and how it is compared."""

    layer: int
    objective: RelationObjective


@dataclass(frozen=True)
class HiddenTarget:
    """Which layer's hidden states are compared, negative from the end, and how much that counts."""

    layer: int
    weight: float


@dataclass(frozen=True, eq=False)
class Everywhere:
    """Positions that divergences are taken over, where those are others than the targets."""

    labels: Tensor
    """`[batch, time]`, aligned: not ignored where a position counts"""
    share: float
    """what divergences are multiplied by: they, too, are divided by the number of targets"""


@dataclass(frozen=True, eq=False)
class DistillTarget:
    """What the student's forward pass needs to know to compute its loss."""

    labels: Tensor
    """`[batch, time]`, not shifted unless they are `aligned`"""
    objective: Objective
    teacher: HiddenStates | SparseStates | None = None
    tile_tokens: int | None = None
    relations: RelationTarget | None = None
    aligned: bool = False
    """whether the label at t already is what t predicts"""
    everywhere: Everywhere | None = None
    """for divergences over other positions than the targets"""
    hidden: HiddenTarget | None = None


@dataclass
class DistillOutput(ModelOutput):
    """The loss summed over the target tokens, and every statistic summed alike; divide by a count of your own.

    `relation` is the attention-relation loss, summed over its rows, which are other tokens.
    """

    loss: Tensor | None = None
    sums: dict[str, Tensor] | None = None
    num_targets: int | None = None
    relation: Tensor | None = None


def base_model_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a `PeftModel`, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def add_distill_forward(model: PreTrainedModel) -> None:
    """Let `model.forward` take `distill=` and `return_hidden=`; without them it is what it was.

    With `return_hidden=`, `attention_layer=` names a layer whose queries, keys and values come along, `hidden_layer=`
    one whose output does.
    """
    original = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(
        self: PreTrainedModel,
        *args: Any,
        distill: DistillTarget | None = None,
        return_hidden: bool = False,
        attention_layer: int | None = None,
        hidden_layer: int | None = None,
        **kwargs: Any,
    ) -> Any:
        if distill is None and not return_hidden:
            return original(*args, **kwargs)
        if distill is not None and distill.relations is not None:
            attention_layer = distill.relations.layer
        if distill is not None and distill.hidden is not None:
            hidden_layer = distill.hidden.layer
        hidden, layer, attention = _hear(self, attention_layer, hidden_layer, *args, **kwargs)
        head = output_head(self)
        hidden = hidden.to(head.weight.device)
        if distill is None:
            return HiddenStates(hidden, head, attention, layer)
        output = _score(hidden, head, distill)
        _compare_hidden(output, layer, distill)
        output.relation = _relate(attention, kwargs.get("attention_mask"), distill)
        return output

    model.forward = types.MethodType(forward, model)


def _hear(
    model: PreTrainedModel, layer: int | None, hidden_layer: int | None, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None, States | None]:
    """Last hidden states, those after one layer, and what the attention of one layer was given."""
    if layer is None:
        return *hidden_states(model, hidden_layer, *args, **kwargs), None
    with capture_attention(model, layer) as heard:
        last, between = hidden_states(model, hidden_layer, *args, **kwargs)
    return last, between, only_capture(heard, layer)


def _relate(attention: States | None, attention_mask: Tensor | None, distill: DistillTarget) -> Tensor | None:
    if distill.relations is None or attention is None:
        return None
    if torch.is_grad_enabled() and not any(states.requires_grad for states in attention):
        raise ConfigError(
            f"`attention_layer` must have trained weights at or before it: layer {distill.relations.layer} carries no "
            "gradient. Choose a later one; and gradient checkpointing must not be reentrant "
            "(gradient_checkpointing_kwargs={'use_reentrant': False})."
        )
    teacher = distill.teacher.attention if isinstance(distill.teacher, HiddenStates) else None
    if teacher is None:
        raise ConfigError("`attention_weight` must be 0 for a teacher that shows no attention states: got one.")
    return attention_relation_loss(attention, teacher, attention_mask, objective=distill.relations.objective)


def hidden_states(model: PreTrainedModel, layer: int | None, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Run the backbone alone: what comes out of it, and of one of its layers if asked for, ``[batch, time, width]``.

    Layer -1 is the last, after the last norm: what comes out of it anyway.
    """
    for name in ("labels", "shift_labels", "num_items_in_batch", "logits_to_keep"):
        kwargs.pop(name, None)  # of the head's business; not every backbone takes them
    kwargs |= {"use_cache": False, "return_dict": True}
    if layer not in (None, LAST_LAYER):
        kwargs["output_hidden_states"] = True
    # looked up on each call: PEFT and FSDP replace modules after the forward was patched
    output = model.base_model(*args, **kwargs)
    last: Tensor = output.last_hidden_state
    if layer is None or layer == LAST_LAYER:
        return last, None if layer is None else last
    return last, output.hidden_states[layer if layer < 0 else layer + 1]  # the first are the embeddings


def _score(hidden: Tensor, head: Head, distill: DistillTarget) -> DistillOutput:
    states: Tensor | SparseTeacher | None = None
    match distill.teacher:
        case HiddenStates() as teacher:
            states = teacher.hidden.to(hidden.device).flatten(0, 1)
        case SparseStates() as teacher:
            states = teacher.flat(hidden.device)
    teacher_head = distill.teacher.head if isinstance(distill.teacher, HiddenStates) else None
    labels = distill.labels.to(hidden.device)
    aligned = labels if distill.aligned else shift_labels(labels)

    def measure(labels: Tensor, objective: Objective) -> DistillationOutput:
        flat, tile = hidden.flatten(0, 1), distill.tile_tokens
        return distillation_loss(
            flat, head, states, teacher_head, labels.flatten(), objective=objective, tile_tokens=tile
        )

    if distill.everywhere is None:
        output = measure(aligned, distill.objective)
        return DistillOutput(loss=output.loss_sum, sums=output.sums(), num_targets=output.num_targets)
    divergences, cross_entropy = distill.objective.parted()
    output, other = measure(aligned, cross_entropy), measure(distill.everywhere.labels, divergences)
    share = distill.everywhere.share
    loss, sums = output.loss_sum + share * other.loss_sum, output.sums()
    own = {"forward_kl": other.forward_kl, "reverse_kl": other.reverse_kl, **other.others}
    sums |= {name: share * value for name, value in own.items() if value is not None} | {"loss": loss.detach()}
    return DistillOutput(loss=loss, sums=sums, num_targets=output.num_targets)


def _compare_hidden(output: DistillOutput, states: Tensor | None, distill: DistillTarget) -> None:
    """Add the hidden-state part to a loss, over the same target tokens."""
    if distill.hidden is None or states is None or output.loss is None or output.sums is None:
        return
    teacher = distill.teacher.layer if isinstance(distill.teacher, HiddenStates) else None
    if teacher is None:
        raise ConfigError("`hidden_weight` must be 0.0 for a teacher that shows no hidden states: got one.")
    labels = distill.labels.to(states.device)
    aligned = labels if distill.aligned else shift_labels(labels)
    part = hidden_state_loss(states.flatten(0, 1), teacher.to(states.device).flatten(0, 1), aligned.flatten())
    output.loss = output.loss + distill.hidden.weight * part.to(output.loss.device)
    output.sums = {**output.sums, "loss": output.loss.detach(), _NAME_OF_HIDDEN: part.detach()}


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
