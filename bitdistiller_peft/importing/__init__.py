"""Models that other tools quantized, as students with the very same codes: one file per format, one proof for all."""

from bitdistiller_peft.importing import awq, bitsandbytes, compressed_tensors, gguf, gptq
from bitdistiller_peft.importing.api import import_model
from bitdistiller_peft.importing.formats import (
    ForeignModel,
    ImportedWeight,
    ImportFormat,
    get_import_format,
    import_format_names,
    register_import_format,
)

__all__ = [
    "ForeignModel",
    "ImportFormat",
    "ImportedWeight",
    "get_import_format",
    "import_format_names",
    "import_model",
    "register_import_format",
]

for _module in (gptq, awq, compressed_tensors, bitsandbytes, gguf):
    register_import_format(_module.FORMAT)
