"""GPTQ checkpoints, v1 and v2, for GPTQModel, SGLang and (4 and 8 bits, symmetric) vLLM.

Codes are packed along the input axis, zero points along the output axis, both as dense little-endian streams; 3-bit
codes straddle words. Version 1 stores ``zero_point - 1``, so it has no zero point 0; version 2 stores it as it is.
The reader here unpacks bit by bit, with none of the code that packs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bitdistiller_peft.errors import ExportError
from bitdistiller_peft.export.affine import (
    cast_exactly,
    fixed_zero_point,
    refuse_not_affine,
    refuse_scales,
    zero_points,
)
from bitdistiller_peft.export.files import TensorFile, read_config, write_config, write_tensors
from bitdistiller_peft.export.formats import ExportFormat, ForeignTensor, ForeignWeight, Options
from bitdistiller_peft.export.source import PackedSource, PackedWeight
from bitdistiller_peft.packing import pack_codes

CHECKPOINT_FORMATS = {1: "gptq", 2: "gptq_v2"}
ROW = 32  # the least number of codes that fills whole words at every width


def _refuse_model(source: PackedSource, options: Options) -> str | None:
    specs = {(w.spec.grid.bits, w.spec.grid.name, w.spec.group_size) for w in source.weights()}
    if len(specs) > 1:
        return f"one width, grid and group size must serve all layers, got {sorted(map(str, specs))}"
    return None


def _refuse(weight: PackedWeight, options: Options) -> str | None:
    if weight.is_transposed:
        return "it is a Conv1D, stored [in, out], and the engines take linear layers only"
    reason = refuse_not_affine(weight) or refuse_scales(weight, torch.float16)
    if reason is not None:
        return reason
    if weight.in_features % ROW or weight.out_features % ROW:
        return f"its widths {weight.out_features} x {weight.in_features} are not multiples of {ROW}"
    if options["version"] == 1 and bool((zero_points(weight) == 0).any()):
        return "a zero point is 0, which version 1 cannot store (it stores one less). Version 2 can"
    return None


def _tensors(weight: PackedWeight, options: Options) -> dict[str, Tensor]:
    bits = weight.spec.grid.bits
    scale = cast_exactly(weight.row_scale, torch.float16)
    if scale is None:
        raise ExportError(f"layer {weight.layer!r} must have float16 scales.")
    stored_zero = zero_points(weight) - (1 if options["version"] == 1 else 0)
    tensors = {
        "qweight": pack_codes(weight.codes, bits).T,
        "qzeros": pack_codes(stored_zero.T, bits),
        "scales": scale.T,
        "g_idx": (torch.arange(weight.in_features) // weight.group_width).to(torch.int32),
    }
    return {f"{weight.layer}.{key}": tensor for key, tensor in tensors.items()}


def _write(source: PackedSource, folder: Path, options: Options) -> None:
    tensors, last = dict(source.plain()), None
    for weight in source.weights():
        tensors |= _tensors(weight, options)
        last = weight
    if last is None:
        raise ExportError("the model must hold quantized layers: got none.")
    section = {
        "quant_method": "gptq",
        "bits": last.spec.grid.bits,
        "group_size": last.spec.group_size if isinstance(last.spec.group_size, int) else -1,
        "desc_act": False,
        "sym": fixed_zero_point(last.spec.grid) is not None,
        "lm_head": False,
        "true_sequential": True,
        "checkpoint_format": CHECKPOINT_FORMATS[options["version"]],
        "pack_dtype": "int32",
        "modules_in_block_to_quantize": None,
        "meta": {"quantizer": [source.quant_config.written_by]},
    }
    write_tensors(folder, tensors)
    write_config(source, folder, {"quantization_config": section})


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Read `count` codes along the first axis of int32 words, bit by bit: int16 ``[count, columns]``."""
    bit = torch.arange(count * bits)
    streams = (words.to(torch.int64)[bit // 32] >> (bit % 32).unsqueeze(-1)) & 1
    weights = (1 << torch.arange(bits)).reshape(1, bits, 1)
    return (streams.reshape(count, bits, -1) * weights).sum(1).to(torch.int16)


def _read(source: PackedSource, folder: Path) -> Iterator[ForeignWeight | ForeignTensor]:
    file, section = TensorFile(folder), read_config(folder)["quantization_config"]
    bits, added = section["bits"], 1 if section["checkpoint_format"] == "gptq" else 0
    for name in source.quantized_names:
        layer = name.removesuffix(".weight")
        scale = file.get(f"{layer}.scales", torch.float16).T
        out_features, groups = scale.shape
        index = file.get(f"{layer}.g_idx", torch.int32)
        codes = unpack_stream(file.get(f"{layer}.qweight", torch.int32), bits, len(index)).T
        zero_point = unpack_stream(file.get(f"{layer}.qzeros", torch.int32).T, bits, out_features) + added
        if not torch.equal(index, torch.arange(len(index), dtype=torch.int32) // (len(index) // groups)):
            raise ExportError(f"tensor '{layer}.g_idx' must number the groups in order: it does not. Export again.")
        where = index.long()
        dense = scale.float()[:, where] * (codes - zero_point[:, where])
        yield ForeignWeight(name, dense, codes, scale, zero_point)
    for name, tensor in file.left():
        yield ForeignTensor(name, tensor)


FORMAT = ExportFormat(
    name="gptq",
    engines="GPTQModel, SGLang, ExLlama; vLLM where 4 or 8 bits and symmetric",
    refuse_weight=_refuse,
    refuse_model=_refuse_model,
    write=_write,
    read=_read,
    options={"version": (2, 1)},
)
