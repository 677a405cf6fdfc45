"""Attention-relation distillation as a part of a run: which layers, which rows, and what is reported.

Its rows are tokens, not target tokens, so it has counts and meters of its own; it is added to the loss after both were
divided by their counts over the whole (accumulated, all-rank) batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.losses import count_rows
from bitdistiller_peft.training.attention import attention_modules, resolve_layer
from bitdistiller_peft.training.config import DistillConfig
from bitdistiller_peft.training.forward import RelationTarget, base_model_of
from bitdistiller_peft.training.metrics import Meter
from bitdistiller_peft.training.teachers import SelfTeacher, SeparateTeacher, Teacher

NAME = "attention_relation"


class Relations:
    """What a trainer keeps about the relation loss.

    Args:
        args: with a positive `attention_weight`.
        student: the base model of the student.
        teacher: who is told which layer to show.

    Raises:
        ConfigError: the teacher shows no states, a layer does not exist, or both models differ in depth and the
            teacher's layer is not named.
    """

    def __init__(self, args: DistillConfig, student: nn.Module, teacher: Teacher | None) -> None:
        if not isinstance(teacher, (SelfTeacher, SeparateTeacher)):
            kind = "none" if teacher is None else teacher.description
            raise ConfigError(
                f"`attention_weight` must be 0 for a teacher that does not run: got teacher {kind}. "
                "Use teacher='self' or a model."
            )
        layer = resolve_layer(student, args.attention_layer)
        teacher.attention_layer = layer
        if isinstance(teacher, SeparateTeacher):
            teacher.attention_layer = _teacher_layer(args, layer, student, base_model_of(teacher.model))
        self.weight = args.attention_weight
        self.target = RelationTarget(layer, args.relation_objective())
        self.total_rows = 0
        self._meters = {"train": Meter(), "eval": Meter()}

    def rows(self, batches: Iterable[Mapping[str, Any]]) -> int:
        """How many tokens the loss of some batches is a sum over."""
        return sum(
            count_rows(batch.get("attention_mask"), batch["input_ids"].shape, self.target.objective)
            for batch in batches
        )

    def share(
        self, relation: Tensor | None, inputs: Mapping[str, Any], split: str, *, is_whole: bool
    ) -> Tensor | float:
        """This part of the loss, weighted and divided by its rows.

        Args:
            relation: the sum over the rows of a batch.
            inputs: the batch.
            split: ``"train"`` or ``"eval"``.
            is_whole: whether to divide by the batch's own rows, not by those of all that make one step.
        """
        if relation is None:
            return 0.0
        own = self.rows([inputs])
        self._meters[split].add({NAME: relation.detach()}, own)
        return self.weight * relation / max(1, own if is_whole else self.total_rows)

    def drain(self, split: str, accelerator: Accelerator) -> dict[str, float]:
        """The mean over rows since the last call, over all ranks, unweighted; a collective call."""
        return self._meters[split].drain(accelerator)


def _teacher_layer(args: DistillConfig, layer: int, student: nn.Module, teacher: nn.Module) -> int:
    depths = [len(attention_modules(model)) for model in (student, teacher)]
    if args.attention_teacher_layer is None and depths[0] != depths[1]:
        raise ConfigError(
            f"`attention_teacher_layer` must be given for a teacher of another depth: got {depths[1]} layers of "
            f"attention for the teacher and {depths[0]} for the student. Use a late one, e.g. "
            f"{resolve_layer(teacher, None)}."
        )
    chosen = layer if args.attention_teacher_layer is None else args.attention_teacher_layer
    return resolve_layer(teacher, chosen, "attention_teacher_layer")
