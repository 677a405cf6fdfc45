"""A low-rank update inside the rounding: what is quantized is ``W + (alpha / rank) * B @ A``, with W frozen.

LoRA (arXiv 2106.09685, equation 3) beside a quantized weight stays a float matrix that is multiplied on every forward.
Inside the rounding it is gone when the weight is packed, and the codes are those that were trained.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LORA_A, LORA_B, LORA_SCALING = "_lora_A", "_lora_B", "_lora_scaling"


def attach_low_rank(module: nn.Module, name: str, rank: int, alpha: float) -> None:
    """Register the factors of an update of `module.name`, which is zero at first.

    They are fp32: A ``[..., rank, in]`` is drawn as `nn.Linear` draws its weight, B ``[..., out, rank]`` is zero.

    Args:
        module: holds the float parameter ``[..., out, in]``.
        name: the parameter's name.
        rank: how many columns B has.
        alpha: the update is multiplied by ``alpha / rank``.
    """
    weight = getattr(module, name)
    *stack, out_features, in_features = weight.shape
    down = torch.empty(*stack, rank, in_features, dtype=torch.float32, device=weight.device)
    up = torch.zeros(*stack, out_features, rank, dtype=torch.float32, device=weight.device)
    if not down.is_meta:
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(down, -bound, bound)
    module.register_parameter(name + LORA_A, nn.Parameter(down))
    module.register_parameter(name + LORA_B, nn.Parameter(up))
    setattr(module, name + LORA_SCALING, alpha / rank)


def latent_weight(module: nn.Module, name: str) -> Tensor:
    """What is quantized: the parameter itself, or with its low-rank update, differentiable."""
    weight: Tensor = getattr(module, name)
    down: Tensor | None = getattr(module, name + LORA_A, None)
    if down is None:
        return weight
    up, scaling = getattr(module, name + LORA_B), getattr(module, name + LORA_SCALING)
    with torch.autocast(weight.device.type, enabled=False):  # rounded factors would be other codes
        return weight + scaling * (up @ down)


def latent_sources(module: nn.Module, name: str) -> list[Tensor | None]:
    """The tensors that `latent_weight` reads."""
    return [getattr(module, name), getattr(module, name + LORA_A, None), getattr(module, name + LORA_B, None)]


def has_update(module: nn.Module, name: str) -> bool:
    """Whether a low-rank update of the parameter is there and not zero."""
    up: Tensor | None = getattr(module, name + LORA_B, None)
    return up is not None and bool(up.any())
