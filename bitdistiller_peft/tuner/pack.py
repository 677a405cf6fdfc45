"""From a trained student to a packed model. All codes are made before the first layer is replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from bitdistiller_peft.errors import BitDistillerError, StateError, WeightError, add_location
from bitdistiller_peft.hub.config import BitDistillerQuantConfig
from bitdistiller_peft.hub.convert import convertible
from bitdistiller_peft.hub.heap import return_freed_memory
from bitdistiller_peft.hub.modules import is_linear
from bitdistiller_peft.hub.quantizer import as_quantized
from bitdistiller_peft.hub.tables import tie_packed_head, tied_head
from bitdistiller_peft.layers import (
    InputSpec,
    PackedLinear,
    SubLN,
    attach_inputs,
    packed_tensors,
    quant_specs,
    quantized,
    register_packed,
    to_packed_embedding,
    to_packed_experts,
    unsharded,
)
from bitdistiller_peft.quantizers import QuantSpec
from bitdistiller_peft.tuner.config import BitDistillerConfig
from bitdistiller_peft.tuner.layer import BitDistillerLayer, BitDistillerLinear
from bitdistiller_peft.tuner.overlays import BitDistillerEmbedding, BitDistillerTiedHead
from bitdistiller_peft.tuner.whole import is_in_parts, whole_copy


@dataclass(frozen=True)
class Packed:
    """One packed parameter, ready to be put in place."""

    layer_name: str
    parameter: str
    spec: QuantSpec
    in_features: int
    tensors: dict[str, Tensor]
    inputs: InputSpec
    norm: SubLN | None
    is_embedding: bool = False


def pack_model(model: nn.Module, layers: list[tuple[str, BitDistillerLayer]], *, progressbar: bool) -> nn.Module:
    """Replace overlays by packed layers and make the model save and load as such.

    Args:
        model: the base model that holds the overlays.
        layers: the overlays, by name.
        progressbar: show progress.

    Returns:
        `model`; where several processes hold it in parts, a new one, whole on each of them.

    Raises:
        StateError: the student is not in force in every layer.
        WeightError, ScaleRangeError: a trained tensor cannot be packed; the layer is named, the model unchanged.
    """
    _check_in_force(layers)
    packed: list[Packed] = []
    for name, layer in tqdm(layers, desc="Packing", disable=not progressbar, unit="layer"):
        packed += pack_layer(name, layer)
        return_freed_memory()
    base_model, noted = _base_model_name(model), _noted(model, layers)
    tied = [name for name, module in model.named_modules() if isinstance(module, BitDistillerTiedHead)]
    if is_in_parts(model):
        left_out = [f"{entry.layer_name}.{entry.parameter}" for entry in packed]
        model = whole_copy(model, left_out, layers[0][1].active_name)
    for entry in packed:
        put_in_place(model, entry)
    return_freed_memory()
    _pack_tied_heads(model, tied, packed)
    _unwrap_saved_modules(model)
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(False) if not packed else _freeze(model)
    describe_packed(model, packed, {"base_model": base_model, **noted})
    return model


def describe_packed(model: nn.Module, packed: Sequence[Packed], provenance: Mapping[str, Any]) -> None:
    """Make a model whose layers were packed save and load as such.

    Args:
        model: the model; nothing happens unless it is a transformers model.
        packed: all of its packed parameters.
        provenance: where they come from.
    """
    if isinstance(model, PreTrainedModel):
        widths = {f"{entry.layer_name}.{entry.parameter}": entry.in_features for entry in packed}
        as_quantized(model, _quant_config(model, packed, provenance), widths)


def _check_in_force(layers: list[tuple[str, BitDistillerLayer]]) -> None:
    if not layers:
        raise StateError("the model must hold trained layers: got none. It was packed, merged or unloaded before.")
    for name, layer in layers:
        if layer.merged:
            raise StateError(f"the adapter must not be merged: layer {name!r} is. Call unmerge_adapter() first.")
        if layer.disable_adapters:
            raise StateError(f"the adapter must be enabled: layer {name!r} is not. Leave disable_adapter() first.")
        if any(layer.active_student(parameter) is None for parameter in layer.parameter_names):
            raise StateError(
                f"the active adapter must cover every layer: layer {name!r} lacks {layer.active_adapters}. "
                "Choose another one with set_adapter()."
            )


def pack_layer(name: str, layer: BitDistillerLayer) -> list[Packed]:
    """Make the codes of a layer; nothing is replaced yet.

    Args:
        name: of the layer.
        layer: an overlay, its student in force.

    Raises:
        WeightError, ScaleRangeError: a trained tensor cannot be packed; the layer is named.
    """
    return [_pack_parameter(name, layer, parameter) for parameter in layer.parameter_names]


@torch.no_grad()
def _pack_parameter(name: str, layer: BitDistillerLayer, parameter: str) -> Packed:
    student = layer.active_student(parameter)
    if student is None:
        raise StateError(f"the active adapter must cover layer {name!r}.")
    adapter_name = layer.active_name
    norm = layer.input_norm(adapter_name)
    with unsharded(student, norm):
        try:
            codes, params = quantized(student, "weight")
        except BitDistillerError as error:
            raise add_location(error, f"layer {name!r}") from None
        norm = None if norm is None else _copied(norm)
    spec = quant_specs(student)["weight"]
    if norm is not None and not bool(torch.isfinite(norm.weight).all()):
        raise WeightError(f"the gains of a SubLN must be finite: got NaN or Inf in layer {name!r}.")
    inputs = InputSpec(layer.activation_bits[adapter_name], None if norm is None else norm.eps)
    tensors, is_embedding = packed_tensors(codes, params, spec), isinstance(layer, BitDistillerEmbedding)
    return Packed(name, parameter, spec, codes.shape[-1], tensors, inputs, norm, is_embedding)


def _copied(norm: SubLN) -> SubLN:
    copy = SubLN(len(norm.weight), norm.eps, norm.weight.device)
    copy.weight.copy_(norm.weight)
    return copy


def put_in_place(model: nn.Module, entry: Packed) -> None:
    """Replace a layer, or its overlay, by the packed one.

    Args:
        model: the model that holds it.
        entry: one of its parameters.
    """
    layer = model.get_submodule(entry.layer_name)
    if entry.is_embedding:
        table = layer.base_layer if isinstance(layer, BitDistillerEmbedding) else layer
        to_packed_embedding(table, entry.spec, entry.tensors, table.weight.dtype)  # type: ignore[arg-type]
        table.train(layer.training)
        model.set_submodule(entry.layer_name, table)
        return
    if isinstance(layer, BitDistillerLinear) or is_linear(layer):
        new = PackedLinear(entry.in_features, len(entry.tensors[""]), spec=entry.spec, device="meta")
        register_packed(new, "weight", entry.spec, entry.tensors)
        attach_inputs(new, entry.inputs)
        if entry.norm is not None:
            new.input_norm = entry.norm
        new.bias = layer.bias  # type: ignore[assignment]  # the very parameter, frozen or not
        new.train(layer.training)
        model.set_submodule(entry.layer_name, new)
        return
    experts = layer.base_layer if isinstance(layer, BitDistillerLayer) else layer
    to_packed_experts(experts, entry.parameter, entry.spec, entry.tensors, entry.in_features)
    model.set_submodule(entry.layer_name, experts)


def _pack_tied_heads(model: nn.Module, heads: list[str], packed: list[Packed]) -> None:
    tables = {entry.layer_name for entry in packed if entry.is_embedding}
    for name in heads:
        head = model.get_submodule(name)
        model.set_submodule(name, head.base_layer if isinstance(head, BitDistillerTiedHead) else head)
        table = next(table for table in tables if tied_head(model, table) == name)
        tie_packed_head(model, table, name)


def _unwrap_saved_modules(model: nn.Module) -> None:
    """Put trained copies (`modules_to_save`) where their originals were."""
    wrappers = [(n, m) for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    for name, wrapper in wrappers:
        trained: Any = wrapper.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        model.set_submodule(name, trained)


def _freeze(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _base_model_name(model: nn.Module) -> str | None:
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    names = [config.base_model_name_or_path for config in configs.values()]
    return next((name for name in names if name), None)


def note_provenance(model: nn.Module, values: Mapping[str, str | float | None]) -> None:
    """Note where the active adapter's weights come from; it is saved with the adapter, and packed with its codes.

    Args:
        model: a student; a model without our adapters is left alone.
        values: by name, e.g. ``{"gamma": 0.4}``.
    """
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    active: list[str] = getattr(model, "active_adapters", []) if configs else []
    for name in active:
        config = configs[name]
        if isinstance(config, BitDistillerConfig):
            config.provenance = {**config.provenance, **values}


def _noted(model: nn.Module, layers: list[tuple[str, BitDistillerLayer]]) -> dict[str, Any]:
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    active = [str(name) for _, layer in layers for name in list(layer.active_adapters)]  # type: ignore[arg-type]
    return dict(configs[active[0]].provenance) if active and active[0] in configs else {}


def _quant_config(model: nn.Module, packed: Sequence[Packed], provenance: Mapping[str, Any]) -> BitDistillerQuantConfig:
    """The config that describes exactly these layers: the commonest spec, and overrides for the rest."""
    by_layer = {entry.layer_name: entry.spec for entry in packed}
    specs = list(by_layer.values())
    # a layout for ternary codes can only be said where the commonest grid is ternary
    common = max(dict.fromkeys(specs), key=lambda spec: (spec.packing == "base3", specs.count(spec)))
    values: dict[str, Any] = common.to_dict()
    embeddings = [entry.layer_name for entry in packed if entry.is_embedding]
    normed = {entry.layer_name: entry.inputs.norm_eps for entry in packed if entry.inputs.norm_eps is not None}
    if normed:
        values["subln"] = "all" if len(normed) == len(by_layer) - len(embeddings) else "output"
        values["subln_eps"] = next(iter(normed.values()))
        values["subln_modules"] = sorted(normed) if values["subln"] == "output" else None
    return BitDistillerQuantConfig(
        **values,
        state="packed",
        activation_bits=next((e.inputs.activation_bits for e in packed if not e.is_embedding), None),
        embeddings=embeddings,
        packing="base3" if any(spec.packing == "base3" for spec in specs) else "bitstream",
        modules_to_not_convert=sorted(name for name, module in convertible(model) if not quant_specs(module)),
        overrides={
            name: {key: value for key, value in spec.to_dict().items() if value != values[key]}
            for name, spec in by_layer.items()
            if spec != common
        },
        provenance=dict(provenance),
    )
