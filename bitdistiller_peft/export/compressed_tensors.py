"""compressed-tensors `pack-quantized`: what vLLM and SGLang load, and transformers decompresses.

Codes lie in the same dense little-endian stream as ours, row by row; zero points are packed along the output axis. An
integer grid is stored as it is; grids with a fixed zero point become the symmetric scheme. `widen_to=4` stores the
same integers in 4 bits, for engines that stop there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitdistiller_peft.errors import ExportError
from bitdistiller_peft.export.affine import fixed_zero_point, refuse_not_affine, zero_points
from bitdistiller_peft.export.files import TensorFile, read_config, write_config, write_tensors
from bitdistiller_peft.export.formats import ExportFormat, ForeignTensor, ForeignWeight, Options
from bitdistiller_peft.export.source import PackedSource, PackedWeight
from bitdistiller_peft.packing import pack_codes


def _refuse(weight: PackedWeight, options: Options) -> str | None:
    if weight.is_transposed:
        return "it is a Conv1D, stored [in, out], and the engines take linear layers only"
    if options["widen_to"] is not None and options["widen_to"] < weight.spec.grid.bits:
        return f"{weight.spec.grid.bits}-bit codes do not fit into widen_to={options['widen_to']}"
    return refuse_not_affine(weight)


def _bits(weight: PackedWeight, options: Options) -> int:
    return options["widen_to"] or weight.spec.grid.bits


def _scheme(weight: PackedWeight, options: Options) -> dict[str, Any]:
    """The `weights` section of a config group."""
    is_channel = weight.params.scale.shape[1] == 1
    return {
        "num_bits": _bits(weight, options),
        "type": "int",
        "symmetric": fixed_zero_point(weight.spec.grid) is not None,
        "strategy": "channel" if is_channel else "group",
        "group_size": None if is_channel else weight.group_width,
        "dynamic": False,
    }


def _tensors(weight: PackedWeight, options: Options) -> dict[str, Tensor]:
    bits, fixed = _bits(weight, options), fixed_zero_point(weight.spec.grid)
    # the symmetric scheme has its zero in the middle of the codes
    shift = 0 if fixed is None else (1 << (bits - 1)) - fixed
    tensors = {
        "weight_packed": pack_codes(weight.codes.to(torch.int16) + shift, bits),
        "weight_scale": weight.row_scale,
        "weight_shape": torch.tensor([weight.out_features, weight.in_features]),
    }
    if fixed is None:
        tensors["weight_zero_point"] = pack_codes(zero_points(weight).T, bits).T
    return {f"{weight.layer}.{key}": tensor for key, tensor in tensors.items()}


def _write(source: PackedSource, folder: Path, options: Options) -> None:
    tensors = dict(source.plain())
    schemes: list[dict[str, Any]] = []
    layers: list[list[str]] = []
    for weight in source.weights():
        tensors |= _tensors(weight, options)
        scheme = _scheme(weight, options)
        if scheme not in schemes:
            schemes.append(scheme)
            layers.append([])
        layers[schemes.index(scheme)].append(weight.layer)
    write_tensors(folder, tensors)
    write_config(source, folder, {"quantization_config": _section(source, schemes, layers)})


def _section(source: PackedSource, schemes: list[dict[str, Any]], layers: list[list[str]]) -> dict[str, Any]:
    """One scheme is said once for all linear layers; several name their layers."""
    groups = {
        f"group_{number}": {
            "targets": ["Linear"] if len(schemes) == 1 else [f"re:^{re.escape(name)}$" for name in names],
            "weights": scheme,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
        for number, (scheme, names) in enumerate(zip(schemes, layers, strict=True))
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(source.quant_config.modules_to_not_convert or []),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _read(source: PackedSource, folder: Path) -> Iterator[ForeignWeight | ForeignTensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(read_config(folder)["quantization_config"])
    compressor = BaseCompressor.get_value_from_registry(config.format)
    file = TensorFile(folder)
    for name in source.quantized_names:
        layer = name.removesuffix(".weight")
        scheme = next(group for group in config.config_groups.values() if _is_target(layer, group.targets))
        names = compressor.compression_param_names(scheme)
        state = {key: file.get(f"{layer}.{key}") for key in names}
        bits, shape = scheme.weights.num_bits, torch.Size(state["weight_shape"].tolist())
        half = 1 << (bits - 1)  # the library shows codes as signed integers
        codes = unpack_from_int32(state["weight_packed"], bits, shape).to(torch.int16) + half
        if codes.shape != shape:
            raise ExportError(f"tensor '{layer}.weight_shape' must be {list(codes.shape)}: got {list(shape)}.")
        scale = state["weight_scale"]
        zero_point = torch.full(scale.shape, half, dtype=torch.int16)
        if not scheme.weights.symmetric:
            packed = state["weight_zero_point"]
            zero_point = unpack_from_int32(packed, bits, scale.shape, packed_dim=0).to(torch.int16) + half
        dense = compressor.decompress(state, scheme)["weight"]
        yield ForeignWeight(name, dense, codes, scale, zero_point)
    for name, tensor in file.left():
        yield ForeignTensor(name, tensor)


def _is_target(layer: str, targets: list[str]) -> bool:
    return any(target == "Linear" or re.match(target.removeprefix("re:"), layer) for target in targets)


FORMAT = ExportFormat(
    name="compressed-tensors",
    engines="vLLM, SGLang (4 and 8 bits), transformers",
    refuse_weight=_refuse,
    write=_write,
    read=_read,
    options={"widen_to": (None, 4, 8)},
    variants=({}, {"widen_to": 4}),
    packages=("compressed_tensors",),
    reader="compressed-tensors",
)
