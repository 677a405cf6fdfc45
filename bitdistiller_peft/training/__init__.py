"""Training: `DistillConfig`, `DistillTrainer`, teachers, and data that the teacher writes."""

from __future__ import annotations

from bitdistiller_peft.training.config import DistillConfig
from bitdistiller_peft.training.data import generate_teacher_data, load_teacher_data
from bitdistiller_peft.training.teachers import SelfTeacher, SeparateTeacher, Teacher
from bitdistiller_peft.training.trainer import DistillTrainer

__all__ = [
    "DistillConfig",
    "DistillTrainer",
    "SelfTeacher",
    "SeparateTeacher",
    "Teacher",
    "generate_teacher_data",
    "load_teacher_data",
]
