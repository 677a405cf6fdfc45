"""Settings that the library's own classes take beyond those declared here; looked up when one is asked for."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

from bitdistiller_peft.cli.options import Option

_SET_BY_US = {
    "output_dir",
    "seed",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
    "hub_strategy",
    "resume_from_checkpoint",
    "debug",  # of the Trainer, and no flag of ours
}


@cache
def quant_options() -> dict[str, Option]:
    """Fields of `BitDistillerConfig` that are not PEFT's own book-keeping."""
    from peft import PeftConfig

    from bitdistiller_peft.tuner import BitDistillerConfig

    foreign = {field.name for field in dataclasses.fields(PeftConfig)}
    return _options(BitDistillerConfig, foreign)


@cache
def calibrate_options() -> dict[str, Option]:
    """The options of all methods, those of the clip search included; each method refuses what it does not know."""
    from bitdistiller_peft.calibration.options import AwqOptions, BlockwiseOptions, GptqOptions

    return _options(AwqOptions, set()) | _options(GptqOptions, set()) | _options(BlockwiseOptions, set())


@cache
def distill_options() -> dict[str, Option]:
    """Fields of `DistillConfig`: everything that `SFTConfig` takes, but for what the command itself decides."""
    from bitdistiller_peft.training import DistillConfig

    return _options(DistillConfig, _SET_BY_US)


def _options(kind: Any, without: set[str]) -> dict[str, Option]:
    return {
        field.name: Option(field.name, _kind(field), _help(field), None)
        for field in dataclasses.fields(kind)
        if field.init and field.name not in without
    }


def _kind(field: dataclasses.Field[Any]) -> str:
    if field.type in (bool, "bool"):
        return "bool"
    if field.type in (int, "int"):
        return "int"
    return "float" if field.type in (float, "float") else "any"


def _help(field: dataclasses.Field[Any]) -> str:
    text = " ".join(str(field.metadata.get("help", "")).split())
    if field.default is not dataclasses.MISSING and field.default is not None:
        default = getattr(field.default, "value", field.default)
        text = f"{text} [{default}]".strip()
    return text
