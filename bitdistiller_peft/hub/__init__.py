"""The transformers socket: quantization config, quantizer, saving, loading and verifying."""

# First: executing it plugs us in, for which the modules below must not be half imported.
import transformers.quantizers.auto  # noqa: F401

from bitdistiller_peft.hub.config import FORMAT_VERSION, QUANT_METHOD, BitDistillerQuantConfig
from bitdistiller_peft.hub.latent import pack_latent
from bitdistiller_peft.hub.manifest import MANIFEST_NAME, verify_files, write_manifest
from bitdistiller_peft.hub.precision import loading_dtype, restore_dtype, stored_dtype
from bitdistiller_peft.hub.quantizer import BitDistillerHfQuantizer
from bitdistiller_peft.hub.summary import QuantSummary, print_quant_summary, quant_summary
from bitdistiller_peft.hub.verify import verify_checkpoint

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "QUANT_METHOD",
    "BitDistillerHfQuantizer",
    "BitDistillerQuantConfig",
    "QuantSummary",
    "loading_dtype",
    "pack_latent",
    "print_quant_summary",
    "quant_summary",
    "restore_dtype",
    "stored_dtype",
    "verify_checkpoint",
    "verify_files",
    "write_manifest",
]
