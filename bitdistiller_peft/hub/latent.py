"""From a latent model, whose own weights were trained under fake quantization, to a packed one, without PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitdistiller_peft.errors import BitDistillerError, StateError, add_location
from bitdistiller_peft.hub.config import BitDistillerQuantConfig
from bitdistiller_peft.hub.heap import return_freed_memory
from bitdistiller_peft.hub.quantizer import as_quantized
from bitdistiller_peft.layers import (
    SUFFIXES,
    FakeQuantLinear,
    InputSpec,
    PackedLinear,
    activation_bits,
    attach_inputs,
    input_norm,
    is_sharded,
    iter_quantized,
    packed_tensors,
    quantized,
    register_packed,
    to_packed_experts,
)
from bitdistiller_peft.quantizers import QuantSpec

if TYPE_CHECKING:  # this module is read while transformers is, when its models are not there yet
    from transformers import PreTrainedModel


@torch.no_grad()
def pack_latent(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a latent model into a packed one, in place.

    What is packed is bit for bit what the forward pass used. Layer by layer, the float weight makes room for the codes.

    Args:
        model: from ``from_pretrained(..., quantization_config=BitDistillerQuantConfig(state="latent", ...))``.

    Returns:
        `model`.

    Raises:
        StateError: the model is not latent, or several processes hold it in parts.
        WeightError, ScaleRangeError: a trained tensor cannot be packed; the layer is named, those before are packed.

    Example:
        >>> pack_latent(model).save_pretrained("packed")  # doctest: +SKIP
    """
    config = getattr(model.config, "quantization_config", None)
    if not isinstance(config, BitDistillerQuantConfig) or config.state != "latent":
        raise StateError(
            "`model` must be latent: load it with quantization_config=BitDistillerQuantConfig(state='latent', ...). A "
            "PeftModel has pack_and_unload()."
        )
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise StateError(
            "a latent model must be whole to be packed: its parameters are in parts. Save it with "
            "trainer.save_model(), and load that in one process."
        )
    widths: dict[str, int] = {}
    for module_name, module, name, spec in list(iter_quantized(model)):
        try:
            codes, params = quantized(module, name)
        except BitDistillerError as error:
            raise add_location(error, f"layer {module_name!r}") from None
        widths[f"{module_name}.{name}"] = codes.shape[-1]
        _put_in_place(model, module_name, name, spec, packed_tensors(codes, params, spec), codes.shape[-1])
        del codes, params, module
        return_freed_memory()
    model.requires_grad_(False)
    values = {k: v for k, v in config.to_dict().items() if k not in ("learn_scale", "learn_zero_point", "gradient")}
    values["state"] = "packed"
    as_quantized(model, BitDistillerQuantConfig.from_dict(values), widths)
    return model


def _put_in_place(
    model: nn.Module, module_name: str, name: str, spec: QuantSpec, tensors: dict[str, Tensor], in_features: int
) -> None:
    module = model.get_submodule(module_name)
    if not isinstance(module, FakeQuantLinear):
        for suffix in SUFFIXES:  # a zero point that is not trained is a buffer, and would stay in the way
            module._buffers.pop(name + suffix, None)
        to_packed_experts(module, name, spec, tensors, in_features)
        return
    new = PackedLinear(module.in_features, module.out_features, spec=spec, device="meta")
    register_packed(new, name, spec, tensors)
    norm = input_norm(module)
    attach_inputs(new, InputSpec(activation_bits(module), None if norm is None else norm.eps))
    if norm is not None:
        new.input_norm = norm
    new.bias = module.bias
    new.train(module.training)
    model.set_submodule(module_name, new)
