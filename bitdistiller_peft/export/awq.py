"""AWQ checkpoints (GEMM layout, 4 bits) for vLLM, SGLang and transformers; narrower codes are stored in 4 bits.

Eight codes of neighbouring output channels share a word, in the order 0 2 4 6 1 3 5 7; zero points likewise.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bitdistiller_peft.errors import ExportError
from bitdistiller_peft.export.affine import cast_exactly, refuse_not_affine, refuse_scales, zero_points
from bitdistiller_peft.export.files import TensorFile, write_config, write_tensors
from bitdistiller_peft.export.formats import ExportFormat, ForeignTensor, ForeignWeight, Options
from bitdistiller_peft.export.source import PackedSource, PackedWeight
from bitdistiller_peft.packing import pack_codes

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _refuse_model(source: PackedSource, options: Options) -> str | None:
    sizes = {weight.spec.group_size for weight in source.weights()}
    return None if len(sizes) == 1 else f"one group size must serve all layers, got {sorted(map(str, sizes))}"


def _refuse(weight: PackedWeight, options: Options) -> str | None:
    if weight.is_transposed:
        return "it is a Conv1D, stored [in, out], and the engines take linear layers only"
    if weight.spec.grid.bits > BITS:
        return f"{weight.spec.grid.bits}-bit codes do not fit into {BITS} bits"
    if weight.out_features % 8:
        return f"its output width {weight.out_features} is not a multiple of 8"
    return refuse_not_affine(weight) or refuse_scales(weight, torch.float16)


def _pack(values: Tensor) -> Tensor:
    """Pack integers ``[rows, out]`` into int32 ``[rows, out / 8]``."""
    return pack_codes(torch.unflatten(values, -1, (-1, 8))[..., list(ORDER)].flatten(-2), BITS)


def _write(source: PackedSource, folder: Path, options: Options) -> None:
    tensors = dict(source.plain())
    group_size: object = -1
    for weight in source.weights():
        scale = cast_exactly(weight.row_scale, torch.float16)
        if scale is None:
            raise ExportError(f"layer {weight.layer!r} must have float16 scales.")
        tensors[f"{weight.layer}.qweight"] = _pack(weight.codes.T)
        tensors[f"{weight.layer}.qzeros"] = _pack(zero_points(weight).T)
        tensors[f"{weight.layer}.scales"] = scale.T
        group_size = weight.spec.group_size
    section = {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": group_size if isinstance(group_size, int) else -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(source.quant_config.modules_to_not_convert or []) or None,
    }
    write_tensors(folder, tensors)
    write_config(source, folder, {"quantization_config": section})


def _unpack(words: Tensor) -> Tensor:
    """Unpack int32 ``[rows, out / 8]`` nibble by nibble: channel ``ORDER[k]`` of eight lies in nibble k."""
    values = torch.empty(len(words), 8 * words.shape[1], dtype=torch.int16)
    for nibble, channel in enumerate(ORDER):
        values[:, channel::8] = ((words.to(torch.int64) >> (4 * nibble)) & 15).to(torch.int16)
    return values


def _read(source: PackedSource, folder: Path) -> Iterator[ForeignWeight | ForeignTensor]:
    file = TensorFile(folder)
    for name in source.quantized_names:
        layer = name.removesuffix(".weight")
        codes = _unpack(file.get(f"{layer}.qweight", torch.int32))
        zero_point = _unpack(file.get(f"{layer}.qzeros", torch.int32))
        scale = file.get(f"{layer}.scales", torch.float16)
        width = len(codes) // len(scale)
        dense = (codes - zero_point.repeat_interleave(width, 0)) * scale.float().repeat_interleave(width, 0)
        yield ForeignWeight(name, dense.T, codes.T, scale.T, zero_point.T)
    for name, tensor in file.left():
        yield ForeignTensor(name, tensor)


FORMAT = ExportFormat(
    name="awq",
    engines="vLLM, SGLang, transformers with GPTQModel",
    refuse_weight=_refuse,
    refuse_model=_refuse_model,
    write=_write,
    read=_read,
)
