"""What a config means on a given model: which modules are targeted, and what is refused before anything changes."""

from __future__ import annotations

import re

from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import nn

from bitdistiller_peft.errors import BitDistillerError, StateError, TargetError, add_location
from bitdistiller_peft.hub.convert import check_expert_groups, convertible, default_skips
from bitdistiller_peft.hub.modules import (
    check_experts,
    dense_weight,
    expert_parameters,
    is_experts,
    is_linear,
    tied_names,
)
from bitdistiller_peft.layers import iter_quantized
from bitdistiller_peft.quantizers import QuantSpec, find_params
from bitdistiller_peft.tuner.config import BitDistillerConfig
from bitdistiller_peft.tuner.layer import BitDistillerLayer

ALL_LINEAR = "all-linear"


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
        names = {name for name, _ in linear_like(model) if name not in skips}
        if not names:
            raise TargetError("the model must have linear layers: got none that can be quantized.")
        config.target_modules = names  # type: ignore[assignment]


def linear_like(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names of the modules that can be quantized; those that an adapter wraps already count under their own name."""
    wrapped = [(n, m) for n, m in model.named_modules() if isinstance(m, BitDistillerLayer)]
    saved = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper))
    inside = (*(f"{name}." for name, _ in wrapped), *saved)
    plain = [(n, m) for n, m in convertible(model) if not (inside and n.startswith(inside))]
    return [*wrapped, *plain]


def check_targets(config: BitDistillerConfig, model: nn.Module) -> None:
    """Refuse, before anything is replaced, every target that could not be quantized or packed.

    Raises:
        TargetError: a target is not a linear layer, is tied, or holds experts in a layout that does not fit.
        GroupSizeError, WeightError, ScaleRangeError: its weight does not suit; the layer is named.
    """
    tied = tied_names(model)
    wrapped = [name for name, module in model.named_modules() if isinstance(module, BitDistillerLayer)]
    inside = tuple(f"{name}." for name in wrapped)
    for name, module in model.named_modules():
        matched = check_target_module_exists(config, name)
        if not name or isinstance(matched, _ExcludedModule) or not matched or (inside and name.startswith(inside)):
            continue
        try:
            _check_target(name, module, config.spec(name), tied)
        except BitDistillerError as error:
            raise add_location(error, f"layer {name!r}") from None


def _check_target(name: str, module: nn.Module, spec: QuantSpec, tied: set[str]) -> None:
    base = module.base_layer if isinstance(module, BitDistillerLayer) else module
    if is_experts(base):
        check_experts(base, name)
        check_expert_groups(spec)
        weights = [getattr(base, parameter) for parameter in expert_parameters(base)]
    elif is_linear(base):
        weights = [dense_weight(base)]
    else:
        raise TargetError(
            f"a targeted module must be a linear layer, a Conv1D or fused experts: got {type(base).__name__}. "
            "Narrow target_modules, or leave it out with exclude_modules."
        )
    if name in tied:
        raise TargetError(
            "a targeted weight must not be tied: it is shared with another module. Leave it out of target_modules, "
            "or untie it first (config.tie_word_embeddings=False and a clone of the weight)."
        )
    for weight in weights:
        find_params(weight, spec)


def other_modules(model: nn.Module, train_other: str) -> list[str]:
    """Endings of the names of norms (and embeddings and head) for PEFT's `modules_to_save`.

    Raises:
        TargetError: embeddings are to be trained and the head is tied to them: copies would come apart.
    """
    norms = [name for name, module in model.named_modules() if _is_norm(module)]
    names = set(norms)
    if train_other == "all":
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        head = model.get_output_embeddings()  # type: ignore[operator]
        chosen = {id(module) for module in (embeddings, head) if module is not None}
        found = [name for name, module in model.named_modules() if id(module) in chosen]
        if tied_names(model) & set(found):
            raise TargetError(
                f"`train_other` must not be 'all' where embeddings and head are tied: got tied modules {found}. "
                "Use train_other='norms', or untie them first."
            )
        names |= set(found)
    return sorted({re.sub(r"^.*\.\d+\.", "", name) for name in names})


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    is_leaf = not any(True for _ in module.children())
    return is_leaf and "norm" in type(module).__name__.lower() and weight is not None and weight.ndim == 1
