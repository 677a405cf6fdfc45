"""Where the student's weights come from: for the packed model's config, and for the card."""

from __future__ import annotations

import json
from typing import Any

from bitdistiller_peft.training.config import DistillConfig
from bitdistiller_peft.training.documents import fingerprint_dataset
from bitdistiller_peft.training.teachers import Teacher


def provenance(
    args: DistillConfig, gamma: float | str | None, teacher: Teacher | None, dataset: Any
) -> dict[str, str | float | None]:
    """What the packed model remembers.

    Args:
        args: of the trainer.
        gamma: as it is used.
        teacher: None for the labels alone.
        dataset: prepared training data.
    """
    return {
        "loss": args.loss_type if args.loss_weights is None else json.dumps(args.loss_weights),
        "gamma": gamma,
        "teacher": None if teacher is None else teacher.description,
        "data": fingerprint_dataset(dataset),
        "examples": len(dataset) if hasattr(dataset, "__len__") else None,
        "epochs": args.num_train_epochs if args.max_steps <= 0 else None,
        "steps": args.max_steps if args.max_steps > 0 else None,
        "learning_rate": args.learning_rate,
    }


def describe_loss(args: DistillConfig, gamma: float | str | None, teacher: Teacher | None) -> str:
    """One sentence on what is minimized.

    Args:
        args: of the trainer.
        gamma: as it is used, if it is known.
        teacher: None for the labels alone.
    """
    which = "" if gamma is None else f", gamma {gamma}"
    name = args.loss_type if args.loss_weights is None else str(args.loss_weights)
    whom = "the labels alone" if teacher is None else f"teacher: {teacher.description}"
    return f"Loss: {name}{which}, {whom}."
