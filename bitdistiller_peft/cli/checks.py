"""What is refused before a model is loaded and before a folder is made, on a dry run too."""

from __future__ import annotations

from typing import Any

from bitdistiller_peft.cli.models import check_source, choose_device
from bitdistiller_peft.cli.verb import Console, Settings

_CALIBRATE_OWN = ("texts", "method", "num_samples", "seq_len", "batch_size", "pack")
_SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "batch_size")


def check_student(settings: Settings, console: Console) -> None:
    """Refuse a model that is not there, and what `quant:` cannot make of it, from its config alone.

    Raises:
        ConfigError: no such model, or a setting that cannot work.
        CheckpointError: the folder is not a model's.
        TargetError, GroupSizeError: a layer does not suit; it is named.
    """
    from bitdistiller_peft.cli.shapes import measure

    check_source(settings.need("model"))
    measure(settings, choose_device(settings, console))


def check_calibration(settings: Settings) -> None:
    """Refuse a method or an option of `calibrate:` that cannot be.

    Raises:
        ConfigError: a value outside its rule.
    """
    from bitdistiller_peft.calibration.options import make_options

    make_options(settings["calibrate.method"], calibration_options(settings))


def calibration_options(settings: Settings) -> dict[str, Any]:
    """The entries of `calibrate:` that are options of the method."""
    values = settings.section("calibrate")
    return {key: value for key, value in values.items() if key not in _CALIBRATE_OWN and value is not None}


def sampling(settings: Settings) -> dict[str, Any]:
    """How the teacher answers, checked.

    Raises:
        ConfigError: a value outside its rule.
    """
    from bitdistiller_peft.training.teacher_data_sampling import Sampling

    values = {key: settings[f"generate.{key}"] for key in _SAMPLING}
    Sampling(**values, seed=settings["seed"])
    return values
