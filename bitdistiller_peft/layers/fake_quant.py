"""Weights in training: a float master weight whose forward value is what will be packed."""

from __future__ import annotations

from torch import Tensor, nn

from bitdistiller_peft.layers.companions import attach_learned_params, fake_quantized, quant_specs
from bitdistiller_peft.layers.inputs import activation_bits, linear, normalized
from bitdistiller_peft.quantizers import QuantSpec


class FakeQuantWeight(nn.Module):
    """A trainable master weight that presents itself fake-quantized; it multiplies nothing.

    Args:
        weight: full-precision start, ``[..., out, in]``; taken over, not copied.
        spec: how to quantize.
        learn_scale: train the scales.
        learn_zero_point: train the zero points.

    Raises:
        WeightError, ScaleRangeError, GroupSizeError: see `attach_learned_params`.
    """

    weight: nn.Parameter

    def __init__(self, weight: Tensor, spec: QuantSpec, *, learn_scale: bool, learn_zero_point: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        attach_learned_params(self, "weight", spec, learn_scale=learn_scale, learn_zero_point=learn_zero_point)

    def forward(self) -> Tensor:
        """The fp32 values ``[..., out, in]`` that the packed weight will hold."""
        return fake_quantized(self, "weight")


class FakeQuantLinear(nn.Linear):
    """A linear layer that trains its own weight under fake quantization, in place of an ordinary one.

    It starts without learned parameters: `attach_learned_params` adds them once the weight is known, `attach_inputs`
    a `SubLN` and int8 activations.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Multiply ``[..., in]`` by the fake-quantized weight, in the dtype of the inputs (or autocast's)."""
        weight, spec = fake_quantized(self, "weight"), quant_specs(self)["weight"]
        return linear(normalized(self, input), weight, self.bias, spec, activation_bits(self))
