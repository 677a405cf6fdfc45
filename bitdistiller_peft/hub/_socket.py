"""The only file that touches transformers' registries."""

from __future__ import annotations

from transformers.quantizers import auto

from bitdistiller_peft.hub.config import QUANT_METHOD, BitDistillerQuantConfig
from bitdistiller_peft.hub.quantizer import BitDistillerHfQuantizer


def register() -> None:
    """Make `from_pretrained` know the method; calling it again changes nothing."""
    if QUANT_METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    auto.register_quantization_config(QUANT_METHOD)(BitDistillerQuantConfig)
    auto.register_quantizer(QUANT_METHOD)(BitDistillerHfQuantizer)
    # only the types in this tuple may pass load-time settings (ours: `verify`) beside a checkpoint's own config
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (BitDistillerQuantConfig,)
