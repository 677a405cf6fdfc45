"""Training: `DistillConfig`, `DistillTrainer` and teachers."""

from __future__ import annotations

from bitdistiller_peft.training.config import DistillConfig
from bitdistiller_peft.training.teachers import SelfTeacher, SeparateTeacher, Teacher
from bitdistiller_peft.training.trainer import DistillTrainer

__all__ = ["DistillConfig", "DistillTrainer", "SelfTeacher", "SeparateTeacher", "Teacher"]
