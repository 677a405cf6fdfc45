"""Which modules of a transformers model hold weights that can be quantized, and in which shape.

`Conv1D` (GPT-2) and the fused experts of mixture-of-experts models are recognised here, by structure, so that no list
of architectures is needed.
"""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from bitdistiller_peft.errors import TargetError
from bitdistiller_peft.layers import PackedLinear, quant_specs

# heads of sequence classification models; quantizing them saves nothing and costs accuracy
CLASSIFICATION_HEADS = ("score", "classifier")


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer or a `Conv1D` with a floating-point weight."""
    # torch's attention multiplies by the weight of its output projection itself, so nothing may stand in for that
    owned = (PackedLinear, NonDynamicallyQuantizableLinear)
    if isinstance(module, owned) or not isinstance(module, (nn.Linear, Conv1D)):
        return False
    return module.weight.is_floating_point()


def expert_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of the 3-D weights ``[experts, out, in]`` of a fused-experts module; empty for other modules."""
    if not type(module).__name__.endswith("Experts"):
        return ()
    own = module.named_parameters(recurse=False)
    return tuple(name for name, p in own if p.ndim == 3 and (p.is_floating_point() or name in quant_specs(module)))


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds fused experts."""
    return bool(expert_parameters(module))


def check_experts(module: nn.Module, name: str) -> None:
    """Refuse experts whose weights are stored ``[experts, in, out]``.

    Raises:
        TargetError: the layout is transposed.
    """
    if getattr(module, "is_transposed", False):
        raise TargetError(
            f"experts must store weights as [experts, out, in]: got the transposed layout in {name!r} "
            f"({type(module).__name__}). Leave them out with exclude_modules=[{name.rpartition('.')[2]!r}]."
        )


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """Output and input width of a linear layer or `Conv1D`."""
    out_features, in_features = module.weight.shape  # type: ignore[misc]
    return (in_features, out_features) if isinstance(module, Conv1D) else (out_features, in_features)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight ``[out, in]`` of a linear layer or `Conv1D`, as a view."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(module, Conv1D) else weight


def output_head_names(model: nn.Module) -> set[str]:
    """Names of the output embedding and of classification heads."""
    heads = [getattr(model, name, None) for name in CLASSIFICATION_HEADS]
    get_head = getattr(model, "get_output_embeddings", None)
    if get_head is not None:
        heads.append(get_head())
    present = {id(head) for head in heads if isinstance(head, nn.Module)}
    return {name for name, module in model.named_modules() if id(module) in present}


def router_names(model: nn.Module) -> set[str]:
    """Names of linear layers that stand beside fused experts: routers and the gates of shared experts."""
    return {
        f"{name}.{child_name}"
        for name, module in model.named_modules()
        if any(is_experts(child) for child in module.children())
        for child_name, child in module.named_children()
        if isinstance(child, nn.Linear)
    }


def fp32_names(model: nn.Module) -> set[str]:
    """Names of the modules that transformers keeps in fp32, e.g. T5's `wo`, to whose weight's dtype T5 casts inputs."""
    kept = (getattr(model, f"_keep_in_fp32_modules{end}", None) or () for end in ("", "_strict"))
    patterns = "|".join(re.escape(key) for keys in kept for key in keys)
    inside = re.compile(rf"(^|\.)({patterns})(\.|$)")
    return {name for name, _ in model.named_modules() if patterns and inside.search(f"{name}.weight")}


def tied_names(model: nn.Module) -> set[str]:
    """Names of the modules whose weight is tied to another module's."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {key.removesuffix(".weight") for pair in tied.items() for key in pair}
