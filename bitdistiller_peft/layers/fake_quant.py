"""Weights in training: a float master weight whose forward value is what will be packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitdistiller_peft.layers.companions import attach_learned_params, fake_quantized, quant_specs
from bitdistiller_peft.layers.inputs import activation_bits, linear, normalized, weight_dtype
from bitdistiller_peft.layers.low_rank import attach_low_rank
from bitdistiller_peft.quantizers import QuantSpec


@dataclass(frozen=True)
class Trained:
    """Which tensors of a fake-quantized weight are trained.

    Attributes:
        scale: the scales.
        zero_point: the zero points.
        weight: the weight itself; without it, it is frozen.
        lora_rank: rank of a trained update inside the rounding; 0 for none.
        lora_alpha: the update is multiplied by ``lora_alpha / lora_rank``.
    """

    scale: bool
    zero_point: bool = False
    weight: bool = True
    lora_rank: int = 0
    lora_alpha: float = 16.0


class FakeQuantWeight(nn.Module):
    """A master weight that presents itself fake-quantized; it multiplies nothing.

    Args:
        weight: full-precision start, ``[..., out, in]``; taken over, not copied.
        spec: how to quantize.
        trained: what is trained.

    Raises:
        WeightError, ScaleRangeError, GroupSizeError: see `attach_learned_params`.
    """

    weight: nn.Parameter

    def __init__(self, weight: Tensor, spec: QuantSpec, trained: Trained) -> None:
        super().__init__()
        self.trained = trained
        self.weight = nn.Parameter(weight)
        attach_learned_params(self, "weight", spec, learn_scale=trained.scale, learn_zero_point=trained.zero_point)
        if trained.lora_rank:
            attach_low_rank(self, "weight", trained.lora_rank, trained.lora_alpha)
        self.freeze_untrained()

    def freeze_untrained(self) -> None:
        """Freeze the weight where it is not trained, whatever else was thawed."""
        if not self.trained.weight:
            self.weight.requires_grad_(False)

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values ``[..., out, in]`` that the packed weight will hold, rounded once from fp32 to `dtype`."""
        return fake_quantized(self, "weight", dtype)


class FakeQuantLinear(nn.Linear):
    """A linear layer that trains its own weight under fake quantization, in place of an ordinary one.

    It starts without learned parameters: `attach_learned_params` adds them once the weight is known, `attach_inputs`
    a `SubLN` and int8 activations.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Multiply ``[..., in]`` by the fake-quantized weight, in the dtype of the inputs (or autocast's)."""
        input, bits = normalized(self, input), activation_bits(self)
        weight = fake_quantized(self, "weight", weight_dtype(input, bits))
        return linear(input, weight, self.bias, quant_specs(self)["weight"], bits)
