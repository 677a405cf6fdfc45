"""Who the student learns from: its own full-precision weights, on loan, or another model.

A teacher is called with a batch and answers with hidden states and its head. It runs through its own root `forward`,
in eval mode, without gradient, and leaves nothing changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.training.forward import HiddenStates, add_distill_forward, base_model_of
from bitdistiller_peft.training.heads import output_head
from bitdistiller_peft.tuner import BitDistillerLayer

_OWN_COPIES = (".bitdistiller_", ".modules_to_save.")


class Teacher(ABC):
    """Answers a batch with last hidden states and a head."""

    @abstractmethod
    def __call__(self, inputs: Mapping[str, Any]) -> HiddenStates:
        """Run on a batch.

        Args:
            inputs: what the student's backbone is given, without labels.
        """

    @property
    @abstractmethod
    def description(self) -> str:
        """How a model card names it."""


class SelfTeacher(Teacher):
    """The student's frozen base weights, with the adapters off: no second model, no copy.

    Args:
        model: the student.

    Raises:
        ConfigError: the model has no frozen original, or trains it in place.
    """

    description = "self"

    def __init__(self, model: nn.Module) -> None:
        advice = "Pass another model as `teacher`, or build the student with get_bitdistiller_model()."
        if not isinstance(model, PeftModel) or not any(isinstance(m, BitDistillerLayer) for m in model.modules()):
            raise ConfigError(
                f"`teacher` must be a model where the student keeps no original: got teacher='self' for "
                f"{type(model).__name__} without BitDistiller adapters. {advice}"
            )
        in_place = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not any(part in name for part in _OWN_COPIES)
        ]
        if in_place:
            raise ConfigError(
                f"`teacher` must be another model where base weights are trained in place: got teacher='self' and "
                f"{len(in_place)} such parameters, e.g. {in_place[0]!r}. Freeze them, use train_other, or {advice}"
            )
        self._model = model

    def __call__(self, inputs: Mapping[str, Any]) -> HiddenStates:
        """Run the student's model with its adapters off."""
        with full_precision(self._model):
            return self._model(**inputs, return_hidden=True)


class SeparateTeacher(Teacher):
    """Another model with the student's vocabulary. It is frozen, set to eval mode and its forward patched.

    Args:
        model: on its device.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self._model = model.eval().requires_grad_(False)
        add_distill_forward(base_model_of(model))

    @property
    def description(self) -> str:
        """Its name or path, or its class."""
        return str(getattr(self._model.config, "_name_or_path", "") or type(self._model).__name__)

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """The model itself."""
        return self._model

    def __call__(self, inputs: Mapping[str, Any]) -> HiddenStates:
        """Run the teacher."""
        self._model.eval()  # whoever called train() on it: dropout in a teacher is noise in the target
        with torch.no_grad():
            return self._model(**inputs, return_hidden=True)


@contextmanager
def full_precision(model: PeftModel) -> Iterator[None]:
    """Lend out the full-precision model; on leaving, adapters, train modes and gradient flags are as they were.

    PEFT's `disable_adapter()` does not serve: on leaving it unfreezes every `modules_to_save` copy, also one that a
    user froze, and it walks the whole model to describe it, on every step.
    """
    layers = [module for module in model.modules() if isinstance(module, BitDistillerLayer)]
    is_off = bool(layers) and all(layer.disable_adapters for layer in layers)
    training = [module for module in model.modules() if module.training]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    model.base_model.disable_adapter_layers()
    try:
        with torch.no_grad():
            yield
    finally:
        if not is_off:
            model.base_model.enable_adapter_layers()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module in training:
            module.training = True


def build_teacher(
    teacher: str | nn.Module, student: nn.Module, accelerator: Accelerator, init_kwargs: Mapping[str, Any]
) -> Teacher:
    """Make a teacher of what the user said.

    Args:
        teacher: `"self"`, a path or Hub name, or a loaded model.
        student: the model to be trained.
        accelerator: says how models are placed.
        init_kwargs: for `from_pretrained`.

    Raises:
        ConfigError: the teacher does not suit; the message says why.
    """
    if isinstance(teacher, str) and teacher == "self":
        return SelfTeacher(student)
    if isinstance(teacher, str):
        teacher = AutoModelForCausalLM.from_pretrained(teacher, **{"dtype": "auto", **init_kwargs})
    if teacher is student or teacher is base_model_of(student):
        raise ConfigError(
            "`teacher` must be another model than the student: got the student itself. Use teacher='self'."
        )
    if not isinstance(teacher, (PreTrainedModel, PeftModel)):
        raise ConfigError(
            f"`teacher` must be 'self', a path or a transformers model: got {type(teacher).__name__}. Use 'self'."
        )
    _check_vocabulary(teacher, student)
    return SeparateTeacher(_placed(teacher, accelerator))


def _check_vocabulary(teacher: nn.Module, student: nn.Module) -> None:
    theirs, ours = (_vocabulary(model) for model in (teacher, student))
    if theirs != ours:
        raise ConfigError(
            f"`teacher` must have the student's vocabulary: got {theirs} tokens for the teacher and {ours} for the "
            "student. Use a teacher of the same family, or resize its embeddings if only the padding differs."
        )


@torch.no_grad()
def _vocabulary(model: nn.Module) -> int:
    base = base_model_of(model)
    out_features = getattr(base.get_output_embeddings(), "out_features", None)
    return int(out_features) if out_features is not None else len(output_head(base).weight)


def _placed(teacher: PreTrainedModel | PeftModel, accelerator: Accelerator) -> PreTrainedModel | PeftModel:
    """Put the teacher where the student is: sharded layer by layer under FSDP2, else whole on this rank's device."""
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, teacher)
    if getattr(teacher, "hf_device_map", None) is None:
        teacher.to(accelerator.device)
    return teacher


def without_labels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What both backbones are given: everything but the labels."""
    return {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}


def labels_of(inputs: Mapping[str, Any]) -> Tensor:
    """The labels `[batch, time]` of a batch.

    Raises:
        ConfigError: the collator made none.
    """
    labels: Tensor | None = inputs.get("labels")
    if labels is None:
        raise ConfigError(
            f"a batch must have `labels`: got {sorted(inputs)}. Use a collator that sets them, -100 where nothing is "
            "to be learned."
        )
    return labels


def num_tokens(inputs: Mapping[str, Any]) -> int:
    """How many tokens of a batch are not padding."""
    mask: Tensor | None = inputs.get("attention_mask")
    return int(mask.sum()) if mask is not None and mask.ndim == 2 else int(inputs["input_ids"].numel())
