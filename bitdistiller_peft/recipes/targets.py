"""What the engines that people serve with can run, as plain data, and the check of a config against it.

The facts are those of the export formats that each engine reads: compressed-tensors (vLLM, transformers), GGUF
(llama.cpp), MLX affine and ONNX MatMulNBits.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitdistiller_peft.errors import ConfigError, UnknownNameError

KEYS = ("bits", "grid", "group_size", "scale_dtype", "zero_point_range", "tied")


@dataclass(frozen=True)
class Target:
    """What an engine can run.

    Attributes:
        bits: code widths, by grid.
        group_sizes: group sizes that it takes; empty for any.
        multiple_of: what a group size must be a multiple of.
        scale_dtypes: dtypes of the scales that reach its arithmetic unrounded.
        zero_point_range: bounds that 2-bit zero points must keep, or `None`.
        fused: layers that it runs as one, which therefore must be quantized alike.
        is_uniform: all layers must be quantized alike.
        kinds: kinds of layers that it runs, see `TargetLayer`.
        architectures: model classes that its files are written for; empty for any.
    """

    bits: dict[str, tuple[int, ...]]
    group_sizes: tuple[int | str, ...] = ()
    multiple_of: int = 1
    scale_dtypes: tuple[str, ...] = ("float16", "bfloat16")
    zero_point_range: tuple[int, int] | None = None
    fused: tuple[tuple[str, ...], ...] = ()
    is_uniform: bool = False
    kinds: tuple[str, ...] = ("linear", "experts")
    architectures: tuple[str, ...] = ()


@dataclass(frozen=True)
class TargetLayer:
    """A layer of a model that is to be quantized, as far as engines care.

    Attributes:
        name: dotted name.
        kind: ``"linear"``, ``"conv1d"`` (GPT-2's transposed one) or ``"experts"`` (several in one tensor).
        widths: input widths of its matrices.
        is_quantized: whether the config targets it; the others only matter beside one that is.
    """

    name: str
    kind: str
    widths: tuple[int, ...]
    is_quantized: bool = True


MAX_SHOWN = 4  # faults in one message; the others are counted
_KINDS = {"linear": "a linear layer", "conv1d": "a Conv1D", "experts": "a module of fused experts"}
_ALL_BITS = {"int": (2, 3, 4, 8), "int_sym": (2, 3, 4, 8), "ternary": (2,)}
_FUSED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))

_ANY_SCALE = ("float16", "bfloat16", "float32")

TARGETS = {
    "vllm": Target(_ALL_BITS, group_sizes=(-1, 32, 64, 128, "tensor"), fused=_FUSED),
    # asymmetric 4-bit codes would be stored in 8 bits, and 8-bit ones fit nowhere
    "llama.cpp": Target(
        {"int": (2, 3), "int_sym": (2, 3, 4, 8), "ternary": (2,)},
        multiple_of=32,
        scale_dtypes=("float16",),
        zero_point_range=(1, 2),
        kinds=("linear",),
        architectures=("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    ),
    "mlx": Target(_ALL_BITS, multiple_of=32, kinds=("linear",)),
    "onnx": Target(
        {"int": (2, 4, 8), "int_sym": (2, 4, 8), "ternary": (2,)},
        multiple_of=16,
        scale_dtypes=_ANY_SCALE,
        kinds=("linear", "conv1d"),
        architectures=(
            "GPT2LMHeadModel",
            "Gemma2ForCausalLM",
            "Gemma3ForCausalLM",
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "OPTForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
        ),
    ),
    "transformers": Target(_ALL_BITS, scale_dtypes=_ANY_SCALE, is_uniform=True),
}


def check_target(config: Any, target: str) -> None:
    """Refuse settings that an engine could not run without quantizing again.

    Args:
        config: a `BitDistillerConfig`, or anything with its settings, `overrides` and `spec(module_name)`.
        target: one of ``"vllm"``, ``"llama.cpp"``, ``"mlx"``, ``"onnx"``, ``"transformers"``.

    Raises:
        UnknownNameError: no such target.
        ConfigError: all settings that do not fit, each with values that do.
    """
    if target not in TARGETS:
        raise UnknownNameError("target", target, TARGETS)
    engine = TARGETS[target]
    common = {key: getattr(config, key) for key in KEYS}
    faults = _faults(common, engine)
    for pattern, override in config.overrides.items():
        # what is wrong everywhere is said once
        new = [fault for fault in _faults(common | override, engine) if fault not in faults]
        faults += [f"overrides[{pattern!r}]: {fault}" for fault in new]
    faults += _mixture_faults(config, common, engine) + _input_faults(config)
    if faults:
        raise ConfigError(f"the config must suit target={target!r}: got {'; '.join(faults)}.")


def needed_zero_point_range(config: Any, target: str) -> list[int] | None:
    """The range that 2-bit integer zero points must keep for an engine, or `None` where any will do.

    Args:
        config: as in `check_target`.
        target: one of the targets; another has no needs.
    """
    bounds = TARGETS[target].zero_point_range if target in TARGETS else None
    return list(bounds) if bounds and config.bits == 2 and config.grid == "int" else None


def _faults(values: dict[str, Any], engine: Target) -> list[str]:
    """What does not fit in one set of settings."""
    grid, bits, size = values["grid"], values["bits"], values["group_size"]
    if grid not in engine.bits:
        return [f"grid={grid!r} (use one of {sorted(engine.bits)})"]
    faults = []
    if bits not in engine.bits[grid]:
        faults.append(f"bits={bits} with grid={grid!r} (use one of {list(engine.bits[grid])})")
    if grid == "r2q" and not values["tied"]:
        faults.append("tied=False with grid='r2q' (use tied=True: evenly spaced levels)")
    if values["scale_dtype"] not in engine.scale_dtypes:
        faults.append(f"scale_dtype={values['scale_dtype']!r} (use one of {list(engine.scale_dtypes)})")
    is_two_bit = bool(engine.zero_point_range) and bits == 2 and grid == "int"
    multiple = _multiple(values, engine)
    if engine.group_sizes and size not in engine.group_sizes:
        faults.append(f"group_size={size!r} (use one of {list(engine.group_sizes)})")
    elif isinstance(size, int) and size > 0 and size % multiple:
        faults.append(f"group_size={size} (use a multiple of {multiple})")
    low, high = values["zero_point_range"] or (0, (1 << bits) - 1)
    if is_two_bit and engine.zero_point_range and not engine.zero_point_range[0] <= low <= high <= 2:
        faults.append(f"zero_point_range={values['zero_point_range']} (use {engine.zero_point_range} at 2 bits)")
    return faults


def _multiple(values: dict[str, Any], engine: Target) -> int:
    """What the number of weights in a group must be a multiple of."""
    is_two_bit = bool(engine.zero_point_range) and values["bits"] == 2 and values["grid"] == "int"
    return 64 if is_two_bit else engine.multiple_of


def check_target_layers(config: Any, target: str, layers: Sequence[TargetLayer], architecture: str = "") -> None:
    """Refuse a model whose layers an engine could not run as the config wants them.

    Args:
        config: as in `check_target`, which it has passed.
        target: one of the targets.
        layers: all layers of the model that could be quantized.
        architecture: the model's class, if it is one of transformers.

    Raises:
        ConfigError: all layers that do not fit, by name, each with the reason.
    """
    engine = TARGETS[target]
    faults = []
    if engine.architectures and architecture and architecture not in engine.architectures:
        faults.append(f"architecture {architecture!r} (use one of {list(engine.architectures)})")
    for layer in layers:
        if layer.is_quantized:
            faults += [
                f"layer {layer.name!r}: {fault}" for fault in _layer_faults(config.spec(layer.name), layer, engine)
            ]
    faults += _fusion_faults(config, engine, layers)
    if faults:
        shown = "; ".join(faults[:MAX_SHOWN]) + (f"; and {len(faults) - MAX_SHOWN} more" if faults[MAX_SHOWN:] else "")
        raise ConfigError(
            f"the model must suit target={target!r}: got {shown}. Leave such layers out with exclude_modules, change "
            "their settings in overrides, or choose another target."
        )


def _layer_faults(spec: Any, layer: TargetLayer, engine: Target) -> list[str]:
    """What does not fit in one layer."""
    if layer.kind not in engine.kinds:
        return [f"it is {_KINDS[layer.kind]} (only {' and '.join(_KINDS[kind] for kind in engine.kinds)} will do)"]
    multiple = _multiple({"bits": spec.grid.bits, "grid": spec.grid.name}, engine)
    is_whole_row = not isinstance(spec.group_size, int) or spec.group_size < 0
    short = [width for width in layer.widths if is_whole_row and width % multiple]
    return (
        [f"group_size={spec.group_size!r} makes groups of {short[0]} (use a multiple of {multiple})"] if short else []
    )


def _fusion_faults(config: Any, engine: Target, layers: Sequence[TargetLayer]) -> list[str]:
    """Layers that run as one and are not quantized alike: other settings, or only some of them."""
    places: dict[tuple[str, tuple[str, ...]], dict[str, Any]] = defaultdict(dict)
    for layer in layers:
        for names in engine.fused:
            ending = next((name for name in names if layer.name.endswith(f".{name}")), None)
            if ending is not None:
                key = (layer.name.removesuffix(ending), names)
                places[key][layer.name] = config.spec(layer.name) if layer.is_quantized else None
    return [
        f"layers {sorted(found)} run as one and must be quantized alike"
        for found in places.values()
        if len(set(found.values())) > 1
    ]


def _mixture_faults(config: Any, common: dict[str, Any], engine: Target) -> list[str]:
    """Layers that must be alike and are not; the first, and those whose number stands in an override, are looked at."""
    if engine.is_uniform and any(common | override != common for override in config.overrides.values()):
        return [f"overrides={config.overrides!r} (use none: all layers must be quantized alike)"]
    faults = []
    for names in engine.fused:
        for number in sorted({"0", *re.findall(r"\d+", " ".join(config.overrides))}, key=int):
            if len({config.spec(f"model.layers.{number}.{name}") for name in names}) > 1:
                faults.append(f"different settings for {list(names)} (use the same: they run as one layer)")
                break
    return faults


def _input_faults(config: Any) -> list[str]:
    """What is done to the inputs of layers, which none of these engines does."""
    faults = []
    if getattr(config, "activation_bits", None) is not None:
        faults.append(f"activation_bits={config.activation_bits} (use None)")
    if getattr(config, "subln", "none") != "none":
        faults.append(f"subln={config.subln!r} (use 'none')")
    return faults
