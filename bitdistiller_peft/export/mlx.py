"""MLX affine quantization, for mlx-lm: ``weight = scale * code + bias`` with ``bias = -scale * zero_point``.

Codes lie in the same dense little-endian stream as ours. Scales and biases keep the scale's dtype where the biases are
numbers of it, else they are fp32, which holds them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitdistiller_peft.export.affine import cast_exactly, refuse_not_affine, zero_points
from bitdistiller_peft.export.files import WEIGHTS_NAME, read_config, write_config, write_tensors
from bitdistiller_peft.export.formats import ExportFormat, ForeignTensor, ForeignWeight, Options
from bitdistiller_peft.export.source import PackedSource, PackedWeight
from bitdistiller_peft.packing import pack_codes

GROUP_SIZES = (32, 64, 128)


def _refuse(weight: PackedWeight, options: Options) -> str | None:
    if weight.is_transposed:
        return "it is a Conv1D, stored [in, out], and mlx-lm quantizes linear layers only"
    if ".experts." in weight.name:
        return "it is one expert of several, which mlx-lm keeps in one tensor"
    width = weight.group_width
    if width not in GROUP_SIZES and not any(width % size == 0 for size in GROUP_SIZES):
        return f"groups of {width} weights are not made of groups of {GROUP_SIZES}"
    if cast_exactly(_bias(weight), torch.float32) is None:
        return "a bias is no float32 number. Train with scale_dtype='float16' or 'bfloat16'"
    return refuse_not_affine(weight)


def _bias(weight: PackedWeight) -> Tensor:
    return -weight.row_scale.double() * zero_points(weight) if refuse_not_affine(weight) is None else torch.zeros(1)


def _group_size(weight: PackedWeight) -> int:
    return max(size for size in GROUP_SIZES if weight.group_width % size == 0)


def _write(source: PackedSource, folder: Path, options: Options) -> None:
    tensors = dict(source.plain())
    settings: dict[str, dict[str, int]] = {}
    for weight in source.weights():
        size, bits = _group_size(weight), weight.spec.grid.bits
        repeat = weight.group_width // size
        scale, bias = weight.row_scale, cast_exactly(_bias(weight), weight.params.scale.dtype)
        if bias is None:
            scale, bias = scale.float(), _bias(weight).float()
        tensors[weight.name] = pack_codes(weight.codes, bits).view(torch.uint32)
        tensors[f"{weight.layer}.scales"] = scale.repeat_interleave(repeat, 1)
        tensors[f"{weight.layer}.biases"] = bias.repeat_interleave(repeat, 1)
        settings[weight.layer] = {"group_size": size, "bits": bits}
    common = next(iter(settings.values()))
    section: dict[str, Any] = {**common, **{k: v for k, v in settings.items() if v != common}}
    write_tensors(folder, tensors, format="mlx")
    write_config(source, folder, {"quantization": section, "quantization_config": section})


def _read(source: PackedSource, folder: Path) -> Iterator[ForeignWeight | ForeignTensor]:
    import mlx.core as mx

    arrays: Any = mx.load(str(folder / WEIGHTS_NAME))
    section = read_config(folder)["quantization"]
    for name in source.quantized_names:
        layer = name.removesuffix(".weight")
        how = section.get(layer, section)
        size, bits = how["group_size"], how["bits"]
        words = arrays.pop(name)
        scale, bias = (arrays.pop(f"{layer}.{key}").astype(mx.float32) for key in ("scales", "biases"))
        ones, zeros = mx.ones_like(scale), mx.zeros_like(bias)
        codes = _tensor(mx.dequantize(words, ones, zeros, group_size=size, bits=bits)).to(torch.int16)
        dense = _tensor(mx.dequantize(words, scale, bias, group_size=size, bits=bits))
        zero_point = torch.round(-_tensor(bias) / _tensor(scale)).to(torch.int16)
        yield ForeignWeight(name, dense, codes, _tensor(scale), zero_point)
    for name, array in arrays.items():
        yield ForeignTensor(name, _tensor(array.astype(mx.float32)))


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))


FORMAT = ExportFormat(
    name="mlx",
    engines="mlx-lm on Apple silicon",
    refuse_weight=_refuse,
    write=_write,
    read=_read,
    packages=("mlx",),
    reader="mlx",
)
