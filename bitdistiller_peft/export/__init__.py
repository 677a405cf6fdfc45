"""Lossless export to the formats that others serve, proven by reading back: one file per format, one shared verify."""

from bitdistiller_peft.export import awq, bitnet, compressed_tensors, dequantized, gguf, gptq, mlx, onnx, openvino
from bitdistiller_peft.export.api import ExportReport, export_model
from bitdistiller_peft.export.formats import (
    ExportFormat,
    ForeignTensor,
    ForeignWeight,
    export_format_names,
    get_export_format,
    register_export_format,
)
from bitdistiller_peft.export.logits import LogitsReport, transformers_engine
from bitdistiller_peft.export.source import PackedSource, PackedWeight
from bitdistiller_peft.export.verify import VerifyReport, verify_export
from bitdistiller_peft.recipes.targets import TARGETS, check_target

__all__ = [
    "TARGETS",
    "ExportFormat",
    "ExportReport",
    "ForeignTensor",
    "ForeignWeight",
    "LogitsReport",
    "PackedSource",
    "PackedWeight",
    "VerifyReport",
    "check_target",
    "export_format_names",
    "export_model",
    "get_export_format",
    "register_export_format",
    "transformers_engine",
    "verify_export",
]

# in the order in which `export_model` looks for one that holds a model: the smallest files first
for _module in (bitnet, compressed_tensors, gguf, gptq, mlx, awq, onnx, openvino, dequantized):
    register_export_format(_module.FORMAT)
