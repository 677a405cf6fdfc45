"""In which state a model is evaluated: found out by looking, so that no score can be passed off as another's."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from bitdistiller_peft.errors import StateError
from bitdistiller_peft.hub.config import QUANT_METHOD
from bitdistiller_peft.layers import PackedEmbedding, PackedExperts, PackedLinear, iter_quantized
from bitdistiller_peft.tuner import BitDistillerLayer

FULL_PRECISION = "full_precision"
PACKED = "packed"
STUDENT = "student"
LATENT = "latent"
LATENT_FLOAT = "latent_float"


def detect_state(model: nn.Module, *, allow_latent: bool = False) -> str:
    """Say what a model computes with.

    - ``"full_precision"``: nothing quantized, or a student whose adapters are disabled: the teacher.
    - ``"packed"``: codes.
    - ``"student"``: a `PeftModel` of ours, fake-quantized: exactly what `pack_and_unload` will pack.
    - ``"latent"``: a checkpoint of that state, loaded with this library and so fake-quantized too. It scores as its
      packed form would, but the files that hold it do not.
    - ``"latent_float"``: the same files loaded without this library: master weights as they are, which nobody can
      deploy. Refused unless asked for.
    - ``"foreign:gptq"`` and the like: quantized by another method.

    ``"+lora"`` and the like is added for adapters of other methods that are active on top. A model that was merged into
    plain floats cannot be told from one that never was anything else.

    Args:
        model: any model.
        allow_latent: let ``"latent_float"`` pass.

    Raises:
        StateError: some layers are in one state and some in another, or the master weights of a latent checkpoint
            would be evaluated unquantized.
    """
    overlays = [(name, m) for name, m in model.named_modules() if isinstance(m, BitDistillerLayer)]
    state = _overlay_state(overlays) if overlays else _plain_state(model)
    if state == LATENT_FLOAT and not allow_latent:
        raise StateError(
            "the model must be quantized before it is evaluated: got the float master weights of a latent checkpoint. "
            "`import bitdistiller_peft` before from_pretrained(), so that they are loaded fake-quantized; or pass "
            "allow_latent=True to score them as they are."
        )
    return state + _foreign_adapters(model)


def is_merged(model: nn.Module) -> bool:
    """Whether a student's values stand in its base layers, where disabling the adapter would remove them for good."""
    return any(isinstance(module, BitDistillerLayer) and module.merged for module in model.modules())


def _overlay_state(overlays: list[tuple[str, BitDistillerLayer]]) -> str:
    in_force = {name: _is_in_force(layer) for name, layer in overlays}
    if len(set(in_force.values())) == 1:
        return STUDENT if all(in_force.values()) else FULL_PRECISION
    absent = next(name for name, is_there in in_force.items() if not is_there)
    raise StateError(
        f"the student must be in force in every layer or in none: got a model with others, but not {absent!r}. "
        "Choose an adapter that covers every layer with set_adapter(), or use disable_adapter()."
    )


def _is_in_force(layer: BitDistillerLayer) -> bool:
    if layer.merged:
        return not layer.disable_adapters
    return all(layer.active_student(name) is not None for name in layer.parameter_names)


def _plain_state(model: nn.Module) -> str:
    kinds = {
        PACKED if isinstance(module, (PackedLinear, PackedExperts, PackedEmbedding)) else LATENT
        for _, module, _, _ in iter_quantized(model)
    }
    if len(kinds) > 1:
        raise StateError("the model must be packed as a whole or not at all: got packed and latent layers.")
    if kinds:
        return kinds.pop()
    method = _quant_method(model)
    if method == QUANT_METHOD:
        return LATENT_FLOAT
    return f"foreign:{method}" if method else FULL_PRECISION


def _quant_method(model: nn.Module) -> str | None:
    section: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    method = section.get("quant_method") if isinstance(section, dict) else getattr(section, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _foreign_adapters(model: nn.Module) -> str:
    """``"+lora"`` for a model on which LoRA is active."""
    kinds = {
        type(module).__module__.split(".")[-2]
        for module in model.modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, BitDistillerLayer) and _is_active(module)
    }
    return "".join(f"+{kind}" for kind in sorted(kinds))


def _is_active(layer: Any) -> bool:
    known = layer._all_available_adapter_names()
    return not layer.disable_adapters and any(name in known for name in layer.active_adapters)
