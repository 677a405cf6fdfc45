"""The output head of a model as the loss needs it: the weight that is in force, bias, scale and cap."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.layers import (
    FakeQuantLinear,
    PackedLinear,
    fake_quantized,
    gathered,
    is_sharded,
    quant_specs,
    whole,
)
from bitdistiller_peft.losses import Head
from bitdistiller_peft.tuner import BitDistillerLayer

__all__ = ["Head", "output_head"]

_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_MULTIPLIES_BY_SCALING = ("hyperclovax",)  # the others that have `logits_scaling` (Granite, MiniCPM3) divide by it


def output_head(model: PreTrainedModel) -> Head:
    """Describe how a model turns last hidden states into logits; call it inside the model's forward.

    A head that is fake-quantized, packed, or a trained copy (`modules_to_save`) is taken as it is in force, so a
    student learns with the head it will have, and a teacher with adapters off speaks with its own.

    Raises:
        ConfigError: the model has no output embedding.
    """
    module = model.get_output_embeddings()
    if module is None:
        raise ConfigError(f"the model must have an output embedding: got {type(model).__name__}. Use a causal LM.")
    _unshard_trained(module)
    weight, bias = _effective(module)
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    return Head(_together(weight), None if bias is None else _together(bias), logit_scale(config), cap)


def logit_scale(config: Any) -> float:
    """The factor that an architecture puts on its logits; 1 for most."""
    for name in _MULTIPLIERS:
        value = getattr(config, name, None)
        if value is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type in _MULTIPLIES_BY_SCALING else 1.0 / float(scaling)


def _effective(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight `[vocab, hidden]` and bias that the module multiplies by right now."""
    if isinstance(module, ModulesToSaveWrapper):
        is_own = bool(module.active_adapters) and not module.disable_adapters
        return _effective(module.modules_to_save[module.active_adapters[0]] if is_own else module.original_module)
    bias: Tensor | None = getattr(module, "bias", None)
    if isinstance(module, BitDistillerLayer):
        student = module.active_student("weight")
        return (module.base_weight("weight") if student is None else student()), bias
    if isinstance(module, PackedLinear):
        return module.dequantize(torch.float32), bias
    if isinstance(module, FakeQuantLinear) and quant_specs(module):
        return fake_quantized(module, "weight"), bias
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight, bias


def _unshard_trained(module: nn.Module) -> None:
    """Fill a trained head that FSDP2 shards by itself: nobody calls it, so its own hook never does.

    The gradient is reduced with the last ones of the backward pass, as that of a unit without inputs.
    """
    if torch.is_grad_enabled() and any(p.requires_grad and isinstance(p, DTensor) for p in module.parameters()):
        for unit in module.modules():
            if isinstance(unit, FSDPModule):
                unit.unshard()


def _together(tensor: Tensor) -> Tensor:
    """A tensor as every process needs it: what is sharded put together, and kept when the forward pass ends."""
    if not is_sharded(tensor):
        return tensor
    if not tensor.requires_grad or not torch.is_grad_enabled():
        with gathered([tensor]):
            return whole(tensor.detach()).clone()
    if isinstance(tensor, DTensor):  # FSDP would not add up the gradients of the processes
        raise ConfigError(
            "a trained output head must be a unit of FSDP, or lie in that of the last norm: it lies in another one. "
            "Use auto_wrap_policy TRANSFORMER_BASED_WRAP, or leave the head untrained."
        )
    return tensor  # ZeRO-3 has gathered it for the forward pass of its engine
