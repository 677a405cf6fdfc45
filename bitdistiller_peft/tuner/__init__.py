"""The PEFT socket: config, overlay layers and tuner, in PEFT's own form. Importing it registers the method."""

from bitdistiller_peft.tuner._socket import register

__all__ = [
    "BitDistillerConfig",
    "BitDistillerEmbedding",
    "BitDistillerLayer",
    "BitDistillerModel",
    "borrowed",
    "full_precision",
    "get_bitdistiller_model",
    "note_provenance",
]

from bitdistiller_peft.tuner.api import get_bitdistiller_model
from bitdistiller_peft.tuner.config import BitDistillerConfig
from bitdistiller_peft.tuner.layer import BitDistillerLayer
from bitdistiller_peft.tuner.lending import borrowed, full_precision
from bitdistiller_peft.tuner.model import BitDistillerModel
from bitdistiller_peft.tuner.overlays import BitDistillerEmbedding
from bitdistiller_peft.tuner.pack import note_provenance

register(BitDistillerConfig, BitDistillerModel)
