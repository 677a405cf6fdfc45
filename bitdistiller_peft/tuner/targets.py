"""What a config means on a given model: which modules are targeted, and what is refused before anything changes."""

from __future__ import annotations

import copy
import re

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import gather_params_ctx
from torch import nn
from transformers.pytorch_utils import Conv1D

from bitdistiller_peft.errors import BitDistillerError, StateError, TargetError, add_location
from bitdistiller_peft.hub.convert import check_expert_groups, check_expert_inputs, convertible, default_skips
from bitdistiller_peft.hub.modules import (
    check_experts,
    dense_weight,
    expert_parameters,
    is_experts,
    is_linear,
    tied_names,
    weight_shape,
)
from bitdistiller_peft.hub.projections import check_projections
from bitdistiller_peft.layers import iter_quantized, quant_specs
from bitdistiller_peft.quantizers import find_params
from bitdistiller_peft.recipes.targets import TargetLayer, check_target_layers
from bitdistiller_peft.tuner.config import BitDistillerConfig
from bitdistiller_peft.tuner.layer import BitDistillerLayer
from bitdistiller_peft.tuner.overlays import BitDistillerEmbedding, BitDistillerTiedHead

ALL_LINEAR = "all-linear"


def check_not_wrapped(model: nn.Module, adapter_name: str) -> None:
    """Refuse to wrap a student again, and to overwrite an adapter that it holds.

    Raises:
        StateError: the model is a PEFT model, or has an adapter of this name.
    """
    if isinstance(model, (PeftModel, PeftMixedModel, BaseTuner)):
        raise StateError(
            f"`model` must be a base model: got a {type(model).__name__}. Use model.add_adapter(name, config) for a "
            "second student."
        )
    for name, module in model.named_modules():
        if isinstance(module, BitDistillerLayer) and any(adapter_name in holder for holder in module.holders()):
            raise StateError(
                f"`adapter_name` must be new: got {adapter_name!r}, and layer {name!r} holds a student of that name. "
                "Use model.add_adapter(name, config) for a second student."
            )


def check_model(model: nn.Module) -> None:
    """Refuse models whose linear layers are not plain full-precision ones.

    Raises:
        StateError: the model is packed or latent already, quantized by another method, or carries another adapter.
    """
    for name, module in model.named_modules():
        if isinstance(module, BitDistillerLayer):
            continue
        if isinstance(module, BaseTunerLayer):
            raise StateError(
                f"the model must not carry another adapter: got {type(module).__name__} in layer {name!r}. "
                "Call merge_and_unload() first."
            )
        if isinstance(module, (nn.Linear, Conv1D)) and not (quant_specs(module) or module.weight.is_floating_point()):
            raise StateError(
                f"the model must hold full-precision weights: layer {name!r} holds {module.weight.dtype}. Load the "
                "model unquantized, or dequantize it first."
            )
    for module_name, _, _, _ in iter_quantized(model):
        if ".bitdistiller_" not in module_name:
            raise StateError(
                f"the model must hold full-precision weights: layer {module_name!r} is quantized already. "
                "Start from the base model; to train a packed one, add LoRA to it with peft.get_peft_model()."
            )
    if getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", "another method")
        raise StateError(
            f"the model must hold full-precision weights: it is quantized with {getattr(method, 'value', method)}. "
            "Load it without quantization_config, or dequantize it first."
        )


def resolve_targets(config: BitDistillerConfig, model: nn.Module) -> None:
    """Replace ``"all-linear"`` by the names it stands for, fused experts included, and refuse tied weights.

    Raises:
        TargetError: a targeted module shares its weight with another one, or nothing can be targeted.
    """
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        skips = set(default_skips(model))
        names = {n for n, _ in linear_like(model) if n not in skips and _is_in_chosen_layers(config, n)}
        if not names:
            chosen = config.layers_to_transform
            where = "" if chosen is None else f" in layers_to_transform={chosen!r}"
            raise TargetError(f"the model must have linear layers to quantize: got none{where}.")
        config.target_modules = names  # type: ignore[assignment]


def _is_in_chosen_layers(config: BitDistillerConfig, name: str) -> bool:
    # PEFT takes a module that is named in full, whatever `layers_to_transform` says; so ask it about the ending
    by_ending = copy.copy(config)
    by_ending.target_modules, by_ending.exclude_modules = {name.rpartition(".")[2]}, None  # type: ignore[assignment]
    return bool(check_target_module_exists(by_ending, name))


def linear_like(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names of the modules that can be quantized; those that an adapter wraps already count under their own name."""
    every = [(n, m) for n, m in model.named_modules() if isinstance(m, BitDistillerLayer)]
    wrapped = [(n, m) for n, m in every if not isinstance(m, (BitDistillerEmbedding, BitDistillerTiedHead))]
    saved = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper))
    inside = (*(f"{name}." for name, _ in every), *saved)
    plain = [(n, m) for n, m in convertible(model) if not (inside and n.startswith(inside))]
    return [*wrapped, *plain]


def check_targets(config: BitDistillerConfig, model: nn.Module) -> None:
    """Refuse, before anything is replaced, every target that could not be quantized or packed.

    Raises:
        TargetError: nothing is targeted, or a target is not a linear layer, is tied, or holds experts in a layout that
            does not fit.
        GroupSizeError, WeightError, ScaleRangeError: its weight does not suit; the layer is named.
    """
    tied = tied_names(model)
    wrapped = [name for name, module in model.named_modules() if isinstance(module, BitDistillerLayer)]
    inside = tuple(f"{name}." for name in wrapped)
    targets = [
        (name, module)
        for name, module in model.named_modules()
        if name and is_target(config, name) and not (inside and name.startswith(inside))
    ]
    if not targets:
        _refuse_empty(config, model)
    check_projections([name for name, _ in targets], config.subln, config.subln_modules)
    for name, module in targets:
        try:
            _check_target(name, module, config, tied)
        except BitDistillerError as error:
            raise add_location(error, f"layer {name!r}") from None


def check_engine(config: BitDistillerConfig, model: nn.Module) -> None:
    """Refuse, before anything is replaced, layers that the config's `target` engine could not run.

    Raises:
        ConfigError: those layers by name, each with the reason.
    """
    if config.target is None:
        return
    layers = []
    for name, module in linear_like(model):
        base = module.base_layer if isinstance(module, BitDistillerLayer) else module
        if is_experts(base):
            kind, widths = "experts", tuple(getattr(base, key).shape[-1] for key in expert_parameters(base))
        else:
            kind, widths = "conv1d" if isinstance(base, Conv1D) else "linear", (weight_shape(base)[1],)
        layers.append(TargetLayer(name, kind, widths, is_target(config, name)))
    check_target_layers(config, config.target, layers, type(model).__name__ if hasattr(model, "config") else "")


def is_target(config: BitDistillerConfig, name: str) -> bool:
    """Whether the config targets the module of this name."""
    if name in config.table_bits:
        return True
    matched = check_target_module_exists(config, name)
    return bool(matched) and not isinstance(matched, _ExcludedModule)


def _refuse_empty(config: BitDistillerConfig, model: nn.Module) -> None:
    targets = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or [])
    if config.exclude_modules or config.modules_to_save:
        raise TargetError(
            "`exclude_modules` and `modules_to_save` must leave a layer to quantize: got "
            f"exclude_modules={config.exclude_modules!r}, modules_to_save={config.modules_to_save!r} with "
            f"target_modules={targets!r}. Shorten them."
        )
    endings = sorted({name.rpartition(".")[2] for name, _ in linear_like(model)})
    where = "" if config.layers_to_transform is None else f" in layers_to_transform={config.layers_to_transform!r}"
    raise TargetError(
        f"`target_modules` must match a layer: got {targets!r}{where}. Use 'all-linear', or names that end in one of "
        f"{endings}."
    )


def _check_target(name: str, module: nn.Module, config: BitDistillerConfig, tied: set[str]) -> None:
    spec = config.spec(name)
    base = module.base_layer if isinstance(module, BitDistillerLayer) else module
    if is_experts(base):
        check_experts(base, name)
        check_expert_groups(spec)
        check_expert_inputs(config.activation_bits, config.subln)
    elif not is_linear(base) and name not in config.table_bits:
        raise TargetError(
            f"a targeted module must be a linear layer, a Conv1D or fused experts: got {type(base).__name__}. "
            "Narrow target_modules, or leave it out with exclude_modules."
        )
    if name in tied and name not in config.table_bits:
        raise TargetError(
            "a targeted weight must not be tied: it is shared with another module. Leave it out of target_modules, "
            "or untie it first (config.tie_word_embeddings=False and a clone of the weight)."
        )
    names = expert_parameters(base) or ("weight",)
    with gather_params_ctx([getattr(base, parameter) for parameter in names], modifier_rank=None):
        for parameter in names:
            find_params(dense_weight(base) if parameter == "weight" else getattr(base, parameter), spec)


def other_modules(config: BitDistillerConfig, model: nn.Module) -> list[str]:
    """Endings of the names of norms (and embeddings and head) for PEFT's `modules_to_save`, if the config wants them.

    Raises:
        TargetError: embeddings are to be trained and the head is tied to them: copies would come apart.
    """
    if config.train_other == "none":
        return []
    copied = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper))
    norms = [name for name, module in model.named_modules() if _is_norm(module)]
    names = {next((prefix[:-1] for prefix in copied if name.startswith(prefix)), name) for name in norms}
    if config.train_other == "all":
        getters = [getattr(model, f"get_{kind}_embeddings", None) for kind in ("input", "output")]
        chosen = {id(getter()) for getter in getters if getter is not None and getter() is not None}
        found = [name for name, module in model.named_modules() if id(module) in chosen]
        tied = tied_names(model) & set(found)
        if tied and not config.table_bits:  # else they are trained as one table
            raise TargetError(
                f"`train_other` must not be 'all' where embeddings and head are tied: got tied modules {found}. "
                "Use train_other='norms', which trains all but these, or untie them first, at the price of a second "
                "matrix: head = model.get_output_embeddings(); head.weight = torch.nn.Parameter(head.weight.clone()); "
                "model.config.tie_word_embeddings = False; model.all_tied_weights_keys = {}."
            )
        names |= {name for name in found if not is_target(config, name) and name not in tied}
    return sorted({re.sub(r"^.*\.\d+\.", "", name) for name in names})


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_leaf = not any(True for _ in module.children())
    return is_leaf and "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1
