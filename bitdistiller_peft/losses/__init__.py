"""How far the student is from its teacher: divergences, CAKLD, masking, and the fused loss that a trainer calls."""

from __future__ import annotations

from bitdistiller_peft.losses.attention_relations import RelationObjective, attention_relation_loss, count_rows
from bitdistiller_peft.losses.cakld import cakld, confidence
from bitdistiller_peft.losses.divergences import forward_kl, jensen_shannon, reverse_kl
from bitdistiller_peft.losses.fused import DistillationOutput, distillation_loss
from bitdistiller_peft.losses.gamma import ConfidenceSums, teacher_confidence
from bitdistiller_peft.losses.hidden_states import hidden_state_loss
from bitdistiller_peft.losses.masking import IGNORE_INDEX, select_targets, shift_labels, sum_over_targets
from bitdistiller_peft.losses.objective import Objective
from bitdistiller_peft.losses.projection import Head
from bitdistiller_peft.losses.registry import Divergence, divergence_names, get_divergence, register_divergence
from bitdistiller_peft.losses.sparse import SparseTeacher

__all__ = [
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "cakld",
    "confidence",
    "shift_labels",
    "select_targets",
    "sum_over_targets",
    "IGNORE_INDEX",
    "Objective",
    "Head",
    "distillation_loss",
    "DistillationOutput",
    "SparseTeacher",
    "RelationObjective",
    "attention_relation_loss",
    "count_rows",
    "hidden_state_loss",
    "teacher_confidence",
    "ConfidenceSums",
    "Divergence",
    "register_divergence",
    "get_divergence",
    "divergence_names",
]
