"""nn.Modules that know torch only: fake-quantized and packed linear layers and experts."""

from bitdistiller_peft.layers.companions import (
    SCALE,
    SCALE_NEGATIVE,
    SUFFIXES,
    ZERO_POINT,
    attach_learned_params,
    companion,
    companion_suffixes,
    fake_quantized,
    iter_quantized,
    packed_layout,
    packed_params,
    packed_tensors,
    quant_specs,
    quantized,
    register_packed,
    set_learned_params,
)
from bitdistiller_peft.layers.experts import (
    FakeQuantExperts,
    PackedExperts,
    forward_with,
    to_fake_quant_experts,
    to_packed_experts,
)
from bitdistiller_peft.layers.fake_quant import FakeQuantLinear, FakeQuantWeight
from bitdistiller_peft.layers.packed import PackedLinear

__all__ = [
    "SCALE",
    "SCALE_NEGATIVE",
    "SUFFIXES",
    "ZERO_POINT",
    "FakeQuantExperts",
    "FakeQuantLinear",
    "FakeQuantWeight",
    "PackedExperts",
    "PackedLinear",
    "attach_learned_params",
    "companion",
    "companion_suffixes",
    "fake_quantized",
    "forward_with",
    "iter_quantized",
    "packed_layout",
    "packed_params",
    "packed_tensors",
    "quant_specs",
    "quantized",
    "register_packed",
    "set_learned_params",
    "to_fake_quant_experts",
    "to_packed_experts",
]
