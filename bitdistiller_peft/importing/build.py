"""From an open foreign model to a student: the full-precision model under it, the codes in it, and the proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.pytorch_utils import Conv1D

from bitdistiller_peft.errors import CheckpointError, ForeignModelError
from bitdistiller_peft.hub.files import check_model_config
from bitdistiller_peft.hub.modules import is_linear, weight_shape
from bitdistiller_peft.importing.formats import ForeignModel, ImportedWeight
from bitdistiller_peft.layers import quantized, set_learned_params
from bitdistiller_peft.tuner import BitDistillerLayer

# would name code to run, or describe files that are not those
_NOT_OURS = ("auto_map", "quantization_config", "_name_or_path", "transformers_version")
_DTYPES = ("float16", "bfloat16", "float32")
_LEFT_OVER = "rotary_emb.inv_freq"  # computed from the config today, stored by older releases


@dataclass(frozen=True)
class Skeleton:
    """The model that a config describes, without its weights.

    Attributes:
        config: the config.
        shapes: ``(out, in)`` of every linear layer, by name.
        transposed: names of `Conv1D` layers.
        parameters: shapes of all parameters.
        tied: names of parameters that are another one's.
    """

    config: PreTrainedConfig
    shapes: dict[str, tuple[int, int]]
    transposed: set[str]
    parameters: dict[str, tuple[int, ...]]
    tied: set[str]


def skeleton_of(values: Mapping[str, Any]) -> Skeleton:
    """Build the model of a config.json on the meta device.

    Raises:
        ForeignModelError: transformers has no causal language model of this type.
        CheckpointError: the config is damaged.
    """
    values = {key: value for key, value in values.items() if key not in _NOT_OURS}
    check_model_config(values)
    kind = str(values.pop("model_type", None))
    try:
        config = AutoConfig.for_model(kind, **values)
        with torch.device("meta"):
            model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    except KeyError:
        raise ForeignModelError(
            f"`model_type` must be a causal language model of transformers: got {kind[:80]!r}. Models that bring code "
            "of their own cannot be imported."
        ) from None
    except Exception as error:
        if isinstance(error, ValueError) and "nrecognized model" in str(error):
            raise ForeignModelError(f"`model_type` must be known to transformers: got {kind[:80]!r}.") from None
        raise CheckpointError(
            f"config.json must describe a model: {type(error).__name__}: {str(error)[:300]}. Download it again."
        ) from error
    linear = [(name, module) for name, module in model.named_modules() if is_linear(module)]
    return Skeleton(
        config,
        {name: weight_shape(module) for name, module in linear},
        {name for name, module in linear if isinstance(module, Conv1D)},
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)},
        set(model.all_tied_weights_keys),
    )


def check_names(foreign: ForeignModel, skeleton: Skeleton) -> tuple[str, ...]:
    """Compare the names of a checkpoint with those of the model, before anything large is read.

    Returns:
        Names of the tensors to take over that are not quantized.

    Raises:
        ForeignModelError: a quantized layer is no linear layer of the model.
        CheckpointError: a tensor is missing, or the model has no place for it.
    """
    for layer in foreign.layers:
        if layer not in skeleton.shapes:
            raise ForeignModelError(
                f"every quantized layer must be a linear layer of {skeleton.config.model_type!r} under its name in "
                f"transformers: {layer!r} is none. Experts, which transformers keeps fused, cannot be imported yet."
            )
    quantized_names = {f"{layer}.weight" for layer in foreign.layers}
    plain, known = [], set(skeleton.parameters) - quantized_names
    for name in foreign.plain_names:
        if name in known:
            plain.append(name)
        elif not _is_left_over(name, foreign):
            raise CheckpointError(
                f"the model must have a place for tensor {name!r}: {skeleton.config.model_type!r} has none. "
                "config.json and weights do not belong together, or the tool that wrote them changes the model as well."
            )
    missing = sorted(known - set(plain) - skeleton.tied)
    if missing:
        raise CheckpointError(f"the checkpoint must hold tensor {missing[0]!r}: it is missing. Download it again.")
    return tuple(plain)


def _is_left_over(name: str, foreign: ForeignModel) -> bool:
    """Whether a tensor says nothing: a computed buffer, or zeros that AutoGPTQ writes for biases that are not there."""
    if name.endswith(_LEFT_OVER):
        return True
    is_bias = name.removesuffix(".bias") in foreign.layers
    return is_bias and not bool(foreign.tensor(name).any())


def dequantized_model(
    foreign: ForeignModel, skeleton: Skeleton, weights: Mapping[str, ImportedWeight], dtype: str
) -> PreTrainedModel:
    """The foreign model in full precision: its own values, rounded once to `dtype`.

    Args:
        foreign: the open checkpoint.
        skeleton: its model.
        weights: the layers that are taken over as codes.
        dtype: ``"auto"`` for that of the checkpoint.

    Raises:
        CheckpointError: a tensor has another shape.
        ForeignModelError: a value is not finite, or the checkpoint's dtype is none to compute in.
    """
    wanted = str(skeleton.config.dtype or "float32").removeprefix("torch.") if dtype == "auto" else dtype
    if wanted not in _DTYPES:
        raise ForeignModelError(f"`dtype` must be 'auto' or one of {list(_DTYPES)}: got dtype={wanted!r}.")
    target: torch.dtype = getattr(torch, wanted)
    names = set(check_names(foreign, skeleton))
    state = {}
    for name, tensor in foreign.plain():
        if name in names:
            state[name] = _of_shape(name, tensor, skeleton.parameters[name]).to(target)
    for layer in foreign.layers:
        found = weights.get(layer)
        dense = foreign.dense(layer, skeleton.shapes[layer]) if found is None else found.dense()
        _check_in_range(layer, dense, target)
        state[f"{layer}.weight"] = (dense.T if layer in skeleton.transposed else dense).to(target).contiguous()
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(skeleton.config)]
    model: PreTrainedModel = kind.from_pretrained(None, config=skeleton.config, state_dict=state, dtype=target)
    model.name_or_path = ""
    return model


def _of_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise CheckpointError(
            f"tensor {name!r} must be floating point of shape {list(shape)}: got {tensor.dtype} {list(tensor.shape)}. "
            "config.json and weights do not belong together; download both again."
        )
    return tensor


def _check_in_range(layer: str, dense: Tensor, dtype: torch.dtype) -> None:
    if float(dense.abs().max()) > torch.finfo(dtype).max:
        raise ForeignModelError(
            f"layer {layer!r} must fit {dtype}: got weights up to {float(dense.abs().max()):.4g}. Pass dtype='float32'."
        )


@torch.no_grad()
def put_codes(student: PeftModel | PeftMixedModel, weights: dict[str, ImportedWeight], adapter_name: str) -> None:
    """Let a student start from foreign codes, and check that packing it at once would give these very codes.

    Args:
        student: fresh from `get_bitdistiller_model`; its specs hold those of the weights.
        weights: by layer; emptied on the way, so that memory is given back.
        adapter_name: name of the student.

    Raises:
        ForeignModelError: the master weights cannot hold the codes in their dtype; the layer is named.
    """
    base: nn.Module = student.base_model.model
    for layer in list(weights):
        found = weights.pop(layer)
        overlay = base.get_submodule(layer)
        if not isinstance(overlay, BitDistillerLayer):
            raise TypeError(f"layer {layer!r} should have an overlay")
        weight = overlay.student("weight", adapter_name)
        weight.weight.copy_(found.dense())
        set_learned_params(weight, "weight", found.params)
        codes, params = quantized(weight, "weight")
        pairs = ((codes, found.codes), (params.scale, found.params.scale), (params.zero_point, found.params.zero_point))
        if any(b is not None and (a is None or not torch.equal(a.to(b.device), b)) for a, b in pairs):
            raise ForeignModelError(
                f"layer {layer!r} must keep its codes: master weights of dtype {weight.weight.dtype} are too coarse "
                "for them. Leave master_dtype at 'float32'."
            )
