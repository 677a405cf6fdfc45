"""Training: `DistillConfig`, `DistillTrainer`, teachers, their caches, and data that the teacher writes."""

from __future__ import annotations

from bitdistiller_peft.training.cache_store import TeacherCache
from bitdistiller_peft.training.cache_writer import cache_teacher
from bitdistiller_peft.training.cached import CachedTeacher
from bitdistiller_peft.training.config import DistillConfig
from bitdistiller_peft.training.data import generate_teacher_data, load_teacher_data
from bitdistiller_peft.training.doctor import Finding, diagnose, divergence_by_layer
from bitdistiller_peft.training.mixtures import MixReport, mix_data
from bitdistiller_peft.training.prepare import prepare_dataset
from bitdistiller_peft.training.teachers import SelfTeacher, SeparateTeacher, Teacher
from bitdistiller_peft.training.trainer import DistillTrainer

__all__ = [
    "CachedTeacher",
    "DistillConfig",
    "DistillTrainer",
    "Finding",
    "MixReport",
    "SelfTeacher",
    "SeparateTeacher",
    "Teacher",
    "TeacherCache",
    "cache_teacher",
    "diagnose",
    "divergence_by_layer",
    "generate_teacher_data",
    "load_teacher_data",
    "mix_data",
    "prepare_dataset",
]
