"""The PEFT socket: config, overlay layers and tuner, in PEFT's own form. Importing it registers the method."""

from bitdistiller_peft.tuner._socket import register

__all__ = ["BitDistillerConfig", "BitDistillerLayer", "BitDistillerModel", "get_bitdistiller_model"]

from bitdistiller_peft.tuner.api import get_bitdistiller_model
from bitdistiller_peft.tuner.config import BitDistillerConfig
from bitdistiller_peft.tuner.layer import BitDistillerLayer
from bitdistiller_peft.tuner.model import BitDistillerModel

register(BitDistillerConfig, BitDistillerModel)
