"""`get_bitdistiller_model`: the front door."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftMixedModel, PeftModel, get_peft_model
from torch import nn

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.tuner.config import BitDistillerConfig
from bitdistiller_peft.tuner.targets import check_not_wrapped


def get_bitdistiller_model(
    model: nn.Module, config: BitDistillerConfig | None = None, adapter_name: str = "default", **kwargs: Any
) -> PeftModel | PeftMixedModel:
    """Give a model a quantized, trainable student; the frozen original stays inside as the teacher.

    The result is an ordinary `PeftModel`: train it with any `Trainer`, save and load it with PEFT, get the exact
    teacher with `disable_adapter()`, and finish with `pack_and_unload()`.

    Args:
        model: a full-precision transformers model (fp32, bf16 or fp16). It is changed in place, as PEFT does.
        config: how to quantize; the default is 2-bit asymmetric integers in groups of 128. It is copied, not changed.
        adapter_name: name of the student.
        kwargs: passed on to `peft.get_peft_model`.

    Raises:
        ConfigError: `config` is not a `BitDistillerConfig`.
        StateError: the model is a `PeftModel`, packed, or quantized by another method.
        TargetError, GroupSizeError, WeightError, ScaleRangeError: a layer does not suit; it is named, and the model
            is as it was.

    Example:
        >>> model = get_bitdistiller_model(model, BitDistillerConfig(bits=2, group_size=64))  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"`model` must be a torch module: got {type(model).__name__}. Pass the loaded model.")
    check_not_wrapped(model, adapter_name)
    config = BitDistillerConfig() if config is None else config
    if not isinstance(config, BitDistillerConfig):
        raise ConfigError(f"`config` must be a BitDistillerConfig: got {type(config).__name__}.")
    return get_peft_model(model, copy.deepcopy(config), adapter_name=adapter_name, **kwargs)
