"""Turn the linear layers and experts of a model into packed or fake-quantized ones, in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator

import torch
from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from bitdistiller_peft.errors import BitDistillerError, TargetError, add_location
from bitdistiller_peft.hub.config import BitDistillerQuantConfig
from bitdistiller_peft.hub.modules import (
    check_experts,
    expert_parameters,
    fp32_names,
    is_experts,
    is_linear,
    output_head_names,
    router_names,
    tied_names,
    weight_shape,
)
from bitdistiller_peft.hub.projections import check_projections
from bitdistiller_peft.hub.tables import convert_embeddings, tied_heads
from bitdistiller_peft.layers import (
    FakeQuantLinear,
    PackedLinear,
    attach_inputs,
    attach_learned_params,
    packed_layout,
    to_fake_quant_experts,
    to_packed_experts,
)
from bitdistiller_peft.quantizers import QuantSpec


def convertible(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Walk over the modules that can be quantized: linear layers, `Conv1D` and fused experts."""
    for name, module in model.named_modules():
        if is_linear(module) or is_experts(module):
            yield name, module


def default_skips(model: nn.Module) -> list[str]:
    """What is left alone unless asked for: heads, tied weights, routers, and what transformers keeps in fp32."""
    return sorted(output_head_names(model) | tied_names(model) | router_names(model) | fp32_names(model))


def resolve_skips(model: nn.Module, names: list[str] | None) -> list[str]:
    """The complete list of convertible modules to leave alone.

    Args:
        model: the model, nothing converted yet.
        names: names or endings of names, as transformers matches them; `None` for the defaults.
    """
    patterns = default_skips(model) if names is None else [*names, *tied_names(model)]
    return sorted(name for name, _ in convertible(model) if patterns and not should_convert_module(name, patterns))


def is_skipped(name: str, skips: Collection[str]) -> bool:
    """Whether a complete list of skips names a module, also when the model lacks its head and with it a prefix."""
    return bool(skipped_among([name], skips))


def skipped_among(names: Collection[str], skips: Collection[str]) -> set[str]:
    """The modules that a complete list of skips names; see `is_skipped`.

    Takes time in proportion to `names` plus `skips`, not to their product: a hostile config can hold a very long list.
    """
    known, depth = set(names), 1 + max((name.count(".") for name in names), default=0)
    by_ending: dict[str, set[str]] = defaultdict(set)
    for name in known:
        for ending in _endings(name, depth):
            by_ending[ending].add(name)
    found: set[str] = set()
    for skip in set(skips):
        found |= by_ending.get(skip, set())
        found |= known.intersection(_endings(skip, depth))
    return found


def _endings(name: str, depth: int) -> list[str]:
    """A dotted name and its endings of at most `depth` parts."""
    parts = name.rsplit(".", depth)
    return [".".join(parts[start:]) for start in range(len(parts))]


def convert_skeleton(model: nn.Module, config: BitDistillerQuantConfig) -> list[str]:
    """Replace modules of a model on the meta device by what `config.state` asks for.

    Returns:
        Names of the converted modules.

    Raises:
        TargetError: nothing is left to convert, a module cannot be converted, or `subln` finds no output projection.
        GroupSizeError: the group size does not divide a layer's input width; the layer is named.
    """
    skips = config.modules_to_not_convert or []
    found = dict(convertible(model))
    tied = tied_heads(model, config)
    left = skipped_among(found, skips) | tied
    targets = [(name, module) for name, module in found.items() if name not in left]
    if not targets:
        raise TargetError(
            f"`modules_to_not_convert` must leave something to quantize: got {skips} and a model without other "
            "linear layers. Shorten the list."
        )
    check_projections([name for name, _ in targets], config.subln, config.subln_modules)
    for name, module in targets:
        try:
            _convert_one(model, name, module, config)
        except BitDistillerError as error:
            raise add_location(error, f"layer {name!r}") from None
    tables = convert_embeddings(model, config)
    for name in (*tables, *tied):
        _protect_from_init(model.get_submodule(name))
    return [*(name for name, _ in targets), *tables]


def _convert_one(model: nn.Module, name: str, module: nn.Module, config: BitDistillerQuantConfig) -> None:
    spec = config.spec(override_name(name, config))
    if is_experts(module):
        check_expert_inputs(config.activation_bits, config.subln)
        _convert_experts(module, name, spec, config)
        return
    out_features, in_features = weight_shape(module)
    bias = module.bias is not None
    new: nn.Linear
    if config.state == "packed":
        new = PackedLinear(
            in_features,
            out_features,
            spec=spec,
            bias=bias,
            inputs=config.inputs(name),
            device="meta",
            dtype=module.weight.dtype,  # type: ignore[arg-type]
        )
    else:
        new = FakeQuantLinear(in_features, out_features, bias=bias, device="meta", dtype=module.weight.dtype)
        attach_learned_params(
            new, "weight", spec, learn_scale=config.learn_scale, learn_zero_point=config.learn_zero_point
        )
        attach_inputs(new, config.inputs(name))
    new.train(module.training)
    if config.state == "packed":
        _protect_from_init(new)
    model.set_submodule(name, new)


def _convert_experts(module: nn.Module, name: str, spec: QuantSpec, config: BitDistillerQuantConfig) -> None:
    check_experts(module, name)
    check_expert_groups(spec)
    for parameter in expert_parameters(module):
        shape = getattr(module, parameter).shape
        if config.state == "packed":
            layout = packed_layout(spec, shape)
            empty = {key: torch.empty(size, dtype=dtype, device="meta") for key, (size, dtype) in layout.items()}
            to_packed_experts(module, parameter, spec, empty, shape[-1])
        else:
            to_fake_quant_experts(module)
            attach_learned_params(
                module,
                parameter,
                spec,
                learn_scale=config.learn_scale,
                learn_zero_point=config.learn_zero_point,
            )
    if config.state == "packed":
        _protect_from_init(module)


def _protect_from_init(module: nn.Module) -> None:
    """Keep `_init_weights` away from codes, whether they are offloaded or missing: it would fail on integers.

    What is loaded, or replaced because it is missing, is a new parameter without this mark, so `check_values` can tell.
    """
    # an embedding may have a factor in a buffer (Gemma), which only initialisation fills in
    module._is_hf_initialized = not isinstance(module, nn.Embedding)  # type: ignore[assignment]
    for parameter in module.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def check_expert_groups(spec: QuantSpec) -> None:
    """Refuse one scale per matrix for fused experts: their files hold the halves of a fused matrix apart.

    Raises:
        TargetError: the group size is ``"tensor"``.
    """
    if spec.group_size == "tensor":
        raise TargetError(
            "`group_size` must be a number for fused experts: got group_size='tensor'. "
            "Use group_size=-1, or leave the experts out with exclude_modules."
        )


def check_expert_inputs(activation_bits: int | None, subln: str) -> None:
    """Refuse what would have to happen inside the experts' own forward.

    Raises:
        TargetError: int8 activations or a `SubLN` are asked for.
    """
    if activation_bits is not None or subln != "none":
        raise TargetError(
            "`activation_bits` and `subln` must be off for fused experts: their forward belongs to the model. Leave "
            "the experts out with exclude_modules (modules_to_not_convert)."
        )


def override_name(name: str, config: BitDistillerQuantConfig) -> str | None:
    """The key in `config.overrides` that means this module, allowing for a missing prefix."""
    return next((key for key in config.overrides if is_skipped(name, [key])), None)
