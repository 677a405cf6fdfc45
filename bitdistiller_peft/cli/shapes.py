"""The shapes of a model from its config alone, and what `quant:` makes of them."""

from __future__ import annotations

import math
from typing import Any

from bitdistiller_peft.cli.memory import Sizes
from bitdistiller_peft.cli.precision import asked_dtype
from bitdistiller_peft.cli.verb import Settings
from bitdistiller_peft.errors import BitDistillerError, ConfigError, add_location

_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


def measure(settings: Settings, device: str) -> Sizes:
    """Build the model without memory and add up.

    Args:
        settings: for `model`, `dtype` and `quant:`.
        device: where it will run, which may decide what it is computed in.

    Raises:
        ConfigError: no such model, or settings that cannot work.
        TargetError, GroupSizeError: a layer does not suit; it is named.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from bitdistiller_peft.layers import packed_bytes
    from bitdistiller_peft.tuner import BitDistillerConfig

    quant = BitDistillerConfig(**{key: value for key, value in settings.section("quant").items() if value is not None})
    try:
        config = AutoConfig.from_pretrained(settings["model"], revision=settings["revision"])
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"`model` must be a folder or a name on the Hub that can be read: {reason}") from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stored = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    asked = settings["dtype"]
    width = _DTYPES.get(asked_dtype(asked, stored, device), 4)
    saved = _DTYPES.get(stored if asked == "auto" else asked, 4)
    shapes = _targets(model, quant)
    packed = sum(packed_bytes(spec, shape) for _, shape, spec in shapes)
    quantized = sum(math.prod(shape) for _, shape, _ in shapes)
    weights = sum(parameter.numel() for parameter in model.parameters())
    return Sizes(
        base_bytes=weights * width,
        quantized=quantized,
        learned=_learned(quant, shapes),
        packed_bytes=packed + (weights - quantized) * saved,
        weights=weights,
        largest=max(math.prod(shape[-2:]) for _, shape, _ in shapes),
        compute_bytes=width,
        **_architecture(config),
    )


def _targets(model: Any, quant: Any) -> list[tuple[str, tuple[int, ...], Any]]:
    """Every weight that would be quantized: name, shape ``[..., out, in]``, spec."""
    from bitdistiller_peft.hub.modules import expert_parameters, is_experts, weight_shape
    from bitdistiller_peft.tuner.tables import resolve_tables
    from bitdistiller_peft.tuner.targets import is_target, linear_like, resolve_targets

    resolve_targets(quant, model)
    resolve_tables(quant, model)
    modules: dict[str, Any] = {name: module for name, module in linear_like(model) if is_target(quant, name)}
    modules |= {name: model.get_submodule(name) for name in quant.table_bits}
    found: list[tuple[str, tuple[int, ...], Any]] = []
    for name, module in modules.items():
        spec = quant.spec(name)
        if is_experts(module):
            shapes = [tuple(getattr(module, parameter).shape) for parameter in expert_parameters(module)]
        else:
            shapes = [tuple(module.weight.shape) if name in quant.table_bits else weight_shape(module)]
        try:
            for shape in shapes:
                spec.param_shape(shape)  # refuses a group size that does not divide
                found.append((name, shape, spec))
        except BitDistillerError as error:
            raise add_location(error, f"layer {name!r}") from None
    if not found:
        raise ConfigError(f"`quant.target_modules` must match a layer: got {quant.target_modules!r}. Use 'all-linear'.")
    return found


def _learned(quant: Any, shapes: list[tuple[str, tuple[int, ...], Any]]) -> int:
    if not quant.learn_scale:
        return 0
    sides = 1 + int(bool(quant.learn_zero_point))
    return sum(math.prod(spec.param_shape(shape)) * sides for _, shape, spec in shapes)


def _architecture(config: Any) -> dict[str, int]:
    text = config.get_text_config()
    hidden = int(text.hidden_size)
    heads = int(getattr(text, "num_attention_heads", 1) or 1)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(text, "head_dim", None) or hidden // heads)
    return {
        "hidden": hidden,
        "intermediate": int(getattr(text, "intermediate_size", None) or 4 * hidden),
        "layers": int(text.num_hidden_layers),
        "vocab": int(text.vocab_size),
        "kv_width": kv_heads * head_dim,
    }
