"""What the engines that people serve with can run, as plain data, and the check of a config against it.

The facts are those of the export formats that each engine reads: compressed-tensors (vLLM, transformers), GGUF
(llama.cpp), MLX affine and ONNX MatMulNBits.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from bitdistiller_peft.errors import ConfigError, UnknownNameError

KEYS = ("bits", "grid", "group_size", "scale_dtype", "zero_point_range")


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
    """

    bits: dict[str, tuple[int, ...]]
    group_sizes: tuple[int, ...] = ()
    multiple_of: int = 1
    scale_dtypes: tuple[str, ...] = ("float16", "bfloat16")
    zero_point_range: tuple[int, int] | None = None
    fused: tuple[tuple[str, ...], ...] = ()
    is_uniform: bool = False


_ALL_BITS = {"int": (2, 3, 4, 8), "int_sym": (2, 3, 4, 8), "ternary": (2,)}
_FUSED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))

TARGETS = {
    "vllm": Target(_ALL_BITS, group_sizes=(-1, 32, 64, 128), fused=_FUSED),
    # asymmetric 4- and 8-bit zero points need offsets that a 16-bit minimum does not hold exactly
    "llama.cpp": Target(
        {"int": (2, 3), "int_sym": (2, 3, 4, 8), "ternary": (2,)},
        multiple_of=32,
        scale_dtypes=("float16",),
        zero_point_range=(1, 2),
    ),
    "mlx": Target(_ALL_BITS, multiple_of=32),
    "onnx": Target(
        {"int": (2, 4, 8), "int_sym": (2, 4, 8), "ternary": (2,)},
        group_sizes=(16, 32, 64, 128, 256),
        scale_dtypes=("float16", "float32"),
    ),
    "transformers": Target(_ALL_BITS, scale_dtypes=("float16", "bfloat16", "float32"), is_uniform=True),
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
    if values["scale_dtype"] not in engine.scale_dtypes:
        faults.append(f"scale_dtype={values['scale_dtype']!r} (use one of {list(engine.scale_dtypes)})")
    is_two_bit = bool(engine.zero_point_range) and bits == 2 and grid == "int"
    multiple = 64 if is_two_bit else engine.multiple_of
    if engine.group_sizes and size not in engine.group_sizes:
        faults.append(f"group_size={size!r} (use one of {list(engine.group_sizes)})")
    elif isinstance(size, int) and size > 0 and size % multiple:
        faults.append(f"group_size={size} (use a multiple of {multiple})")
    low, high = values["zero_point_range"] or (0, (1 << bits) - 1)
    if is_two_bit and engine.zero_point_range and not engine.zero_point_range[0] <= low <= high <= 2:
        faults.append(f"zero_point_range={values['zero_point_range']} (use {engine.zero_point_range} at 2 bits)")
    return faults


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
