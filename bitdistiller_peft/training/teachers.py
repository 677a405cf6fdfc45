"""Who the student learns from: its own full-precision weights, on loan, or another model.

A teacher is called with a batch and answers with hidden states and its head. It runs through its own root `forward`,
in eval mode, without gradient, and leaves nothing changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.losses import IGNORE_INDEX
from bitdistiller_peft.training.forward import HiddenStates, SparseStates, add_distill_forward, base_model_of
from bitdistiller_peft.tuner import BitDistillerLayer, full_precision

_OWN_COPIES = (".bitdistiller_", ".modules_to_save.")


class Teacher(ABC):
    """Answers a batch with last hidden states and a head, or with the likeliest tokens."""

    attention_layer: int | None = None
    """A layer whose queries, keys and values are to come along."""
    hidden_layer: int | None = None
    """A layer whose hidden states are to come along, negative from the end."""

    @abstractmethod
    def __call__(self, inputs: Mapping[str, Any]) -> HiddenStates | SparseStates:
        """Run on a batch.

        Args:
            inputs: what the student's backbone is given, without labels.
        """

    @property
    def _wanted(self) -> dict[str, int | None]:
        return {"attention_layer": self.attention_layer, "hidden_layer": self.hidden_layer}

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
            return self._model(**inputs, return_hidden=True, **self._wanted)


class SeparateTeacher(Teacher):
    """Another model with the student's vocabulary. It is frozen, set to eval mode and its forward patched.

    Args:
        model: on its device.
        description: how a model card names it; its name or path by default.
        forward: what is called in place of the model, where an engine holds it.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        description: str | None = None,
        *,
        forward: Callable[..., HiddenStates] | None = None,
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self._forward = model if forward is None else forward
        self._description = description
        add_distill_forward(base_model_of(model))

    @property
    def description(self) -> str:
        """Its name or path, or its class."""
        return self._description or str(getattr(self._model.config, "_name_or_path", "") or type(self._model).__name__)

    @property
    def model(self) -> PreTrainedModel | PeftModel:
        """The model itself."""
        return self._model

    def __call__(self, inputs: Mapping[str, Any]) -> HiddenStates:
        """Run the teacher."""
        self._model.eval()  # whoever called train() on it: dropout in a teacher is noise in the target
        with torch.no_grad():
            return self._forward(**inputs, return_hidden=True, **self._wanted)


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


def num_targets(labels: Tensor) -> int:
    """How many tokens of labels `[batch, time]`, not shifted, are predicted by the one before."""
    return int((labels[..., 1:] != IGNORE_INDEX).sum())


def num_tokens(inputs: Mapping[str, Any]) -> int:
    """How many tokens of a batch are not padding."""
    mask: Tensor | None = inputs.get("attention_mask")
    return int(mask.sum()) if mask is not None and mask.ndim == 2 else int(inputs["input_ids"].numel())
