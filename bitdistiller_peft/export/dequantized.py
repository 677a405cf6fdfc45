"""Ordinary 16-bit (or fp32) safetensors: every grid, every engine, no size gain.

Weights are computed in fp32 and rounded once to the model's dtype, as the reference kernel does, so that the result is
the very model that was evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from bitdistiller_peft.export.files import TensorFile, read_config, write_config, write_tensors
from bitdistiller_peft.export.formats import ExportFormat, ForeignTensor, ForeignWeight, Options
from bitdistiller_peft.export.source import PackedSource, PackedWeight


def _refuse(weight: PackedWeight, options: Options) -> str | None:
    return None


def _write(source: PackedSource, folder: Path, options: Options) -> None:
    dtype = getattr(torch, options["dtype"]) if options["dtype"] else source.dtype
    tensors = dict(source.plain())
    for weight in source.weights():
        dense = weight.dense(dtype)
        tensors[weight.name] = dense.T if weight.is_transposed else dense
    write_tensors(folder, tensors)
    write_config(source, folder, {"dtype": str(dtype).removeprefix("torch.")})


def _read(source: PackedSource, folder: Path) -> Iterator[ForeignWeight | ForeignTensor]:
    file = TensorFile(folder)
    dtype = getattr(torch, read_config(folder)["dtype"])
    for name in source.quantized_names:
        dense = file.get(name, dtype)
        yield ForeignWeight(name, dense.T if source.weight(name).is_transposed else dense)
    for name, tensor in file.left():
        yield ForeignTensor(name, tensor)


FORMAT = ExportFormat(
    name="dequantized",
    engines="everything that reads safetensors: transformers, vLLM, SGLang",
    refuse_weight=_refuse,
    write=_write,
    read=_read,
    options={"dtype": (None, "bfloat16", "float16", "float32")},
    reader="safetensors",
)
