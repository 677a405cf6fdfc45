"""The hidden-state part of the loss: which layer is compared, and with which teachers it can be."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.training.cached import CachedTeacher
from bitdistiller_peft.training.config import DistillConfig
from bitdistiller_peft.training.forward import LAST_LAYER, HiddenTarget, base_model_of
from bitdistiller_peft.training.teachers import SeparateTeacher, Teacher


def hidden_target(args: DistillConfig, student: PreTrainedModel, teacher: Teacher | None) -> HiddenTarget | None:
    """What is compared; the teacher is told which layer to show.

    Args:
        args: `hidden_weight` and `hidden_layer`.
        student: the base model of the student.
        teacher: of the run.

    Returns:
        None for a weight of 0.

    Raises:
        ConfigError: student or teacher has no such layer, or the teacher was cached without it.
    """
    if not args.hidden_weight or teacher is None:
        return None
    layer = args.hidden_layer
    _check_layer(layer, student, "student")
    if isinstance(teacher, SeparateTeacher):
        _check_layer(layer, base_model_of(teacher.model), "teacher")
    if isinstance(teacher, CachedTeacher) and (layer != LAST_LAYER or teacher.cache.layout.kind != "hidden"):
        raise ConfigError(
            f"`hidden_layer` must be -1 with teacher='cached' and a cache of kind 'hidden': got {layer} "
            f"and kind {teacher.cache.layout.kind!r}. Use hidden_layer=-1, or teacher='self'."
        )
    teacher.hidden_layer = layer
    return HiddenTarget(layer, args.hidden_weight)


def _check_layer(layer: int, model: nn.Module, whose: str) -> None:
    config: Any = model.config
    depth = int(config.get_text_config().num_hidden_layers)
    if not -depth <= layer < depth:
        raise ConfigError(
            f"`hidden_layer` must be a layer of the {whose}: got hidden_layer={layer}, and it has {depth}. Use -1 for "
            f"the last, or a late one, e.g. {int(depth * 0.8)}."
        )
