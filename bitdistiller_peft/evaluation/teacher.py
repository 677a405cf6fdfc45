"""Who speaks as the teacher: another model, or the student itself with its adapters disabled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bitdistiller_peft.errors import ConfigError, StateError
from bitdistiller_peft.evaluation.state import FULL_PRECISION, STUDENT, detect_state, is_merged

SELF = "self"


def check_teacher(student: nn.Module, teacher: nn.Module | str, state: str) -> str:
    """The teacher's state; refuses comparisons that could only come out as equal.

    Args:
        student: what is evaluated.
        teacher: another model, or ``"self"``: the student with its adapters disabled.
        state: the student's, from `detect_state`.

    Raises:
        ConfigError: another text than ``"self"``.
        StateError: ``"self"`` for a model that is no student in force, or a model against itself.
    """
    if isinstance(teacher, str):
        if teacher != SELF:
            raise ConfigError(f"`teacher` must be a model or 'self': got {teacher!r}. Load the model first.")
        if state != STUDENT or is_merged(student):
            found = "a merged student" if is_merged(student) else f"a model in state {state!r}"
            raise StateError(
                f"teacher='self' needs a student whose adapter can be disabled: got {found}. "
                "Pass the full-precision model as `teacher`."
            )
        return FULL_PRECISION
    if any(module is teacher for module in student.modules()) or any(module is student for module in teacher.modules()):
        raise StateError("`teacher` must be another model: got the student, or a part of it. Use teacher='self'.")
    return detect_state(teacher)


@contextmanager
def speaking(teacher: nn.Module | str, student: Any) -> Iterator[nn.Module]:
    """The model that speaks as the teacher."""
    if not isinstance(teacher, str):
        yield teacher
        return
    with student.disable_adapter():
        yield student
