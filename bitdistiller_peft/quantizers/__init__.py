"""HOW a weight becomes codes and comes back: grouping, parameters, rounding, gradients. Formula and reference."""

from bitdistiller_peft.quantizers.activation import (
    check_activation_bits,
    fake_quantize_activations,
    quantize_activations,
)
from bitdistiller_peft.quantizers.base import REFERENCE_SWEEPS, Extremes, Gradients, Quantizer, Sweeps
from bitdistiller_peft.quantizers.fine import zero_of
from bitdistiller_peft.quantizers.functional import (
    dequantize,
    fake_quantize,
    find_params,
    quantize,
    store_learned_params,
)
from bitdistiller_peft.quantizers.grouping import GroupSize, check_group_size, num_groups, to_groups
from bitdistiller_peft.quantizers.registry import get_quantizer, register_quantizer
from bitdistiller_peft.quantizers.rounding import check_residual_scale, check_scale
from bitdistiller_peft.quantizers.spec import SCALE_DTYPES, QuantParams, QuantSpec

__all__ = [
    "REFERENCE_SWEEPS",
    "SCALE_DTYPES",
    "Extremes",
    "Gradients",
    "GroupSize",
    "QuantParams",
    "QuantSpec",
    "Quantizer",
    "Sweeps",
    "check_activation_bits",
    "check_group_size",
    "check_residual_scale",
    "check_scale",
    "dequantize",
    "fake_quantize",
    "fake_quantize_activations",
    "find_params",
    "get_quantizer",
    "num_groups",
    "quantize",
    "quantize_activations",
    "register_quantizer",
    "store_learned_params",
    "to_groups",
    "zero_of",
]
