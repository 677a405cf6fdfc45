"""compressed-tensors `pack-quantized`, as llm-compressor writes it.

Codes and zero points are signed integers plus ``2**(bits - 1)``; codes lie in a dense little-endian stream row by row,
zero points along the output axis. Widths are told by the shapes and must be among those that config.json names.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitdistiller_peft.errors import CheckpointError, ForeignModelError
from bitdistiller_peft.importing.affine import WIDTHS, affine_weight
from bitdistiller_peft.importing.folder import FLOATS, TensorFolder, choice, refuse_entries
from bitdistiller_peft.importing.formats import ForeignModel, ImportedWeight, ImportFormat
from bitdistiller_peft.packing import num_words, unpack_codes

PACKED = ".weight_packed"
SUFFIXES = (PACKED, ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx")
FORMAT_NAME = "pack-quantized"
_MORE = {
    "transform_config": "Its inputs are rotated as well; start from a checkpoint without transforms.",
    "sparsity_config": "Its weights are also stored sparsely; start from a dense checkpoint.",
}
_ADVICE = "Only integer weights can be taken over: formats 'pack-quantized', 2, 3, 4 and 8 bits, activations untouched."


def _open(path: Path) -> ForeignModel:
    folder = TensorFolder(path)
    choice(folder.section, "format", (FORMAT_NAME,), advice=_ADVICE)
    refuse_entries(folder.section, _MORE)
    widths = _widths(folder.section)
    layers = {name.removesuffix(PACKED) for name in folder.names if name.endswith(PACKED)}
    return folder.model("compressed-tensors", layers, SUFFIXES, partial(_read, folder, widths))


def _widths(section: Mapping[str, Any]) -> tuple[int, ...]:
    """The widths that the config names, after everything else in its groups has been looked at."""
    groups = section.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise CheckpointError("`config_groups` of the checkpoint must name groups of layers: it does not.")
    widths = set()
    for group in groups.values():
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise ForeignModelError("every group of the checkpoint must quantize weights: one does not.")
        choice(group, "format", (FORMAT_NAME, None), advice=_ADVICE)
        choice(weights, "type", ("int",), advice=_ADVICE)
        choice(weights, "strategy", ("group", "channel", "tensor"), advice=_ADVICE)
        refuse_entries(group, dict.fromkeys(("input_activations", "output_activations"), _ADVICE))
        widths.add(choice(weights, "num_bits", WIDTHS[2:] + WIDTHS[:2], advice=_ADVICE))
    return tuple(sorted(widths))


def _read(folder: TensorFolder, widths: tuple[int, ...], layer: str, shape: tuple[int, int]) -> ImportedWeight:
    out_features, in_features = shape
    declared = folder.get(f"{layer}.weight_shape", (2,), torch.int64, torch.int32)
    words = folder.shape(layer + PACKED, 2)[1]
    fitting = [bits for bits in widths if num_words(in_features, bits) == words]
    if tuple(declared.tolist()) != shape or len(fitting) != 1:
        raise CheckpointError(
            f"'weight_packed' must hold {list(shape)} codes of {' or '.join(map(str, widths))} bits, without padding: "
            f"got {words} words a row for a declared shape {declared.tolist()}. config.json and weights do not belong "
            "together, or the file was written by a release that padded 3-bit codes; write it again with a newer one."
        )
    bits = fitting[0]
    scale = _scale(folder, layer, out_features)
    groups = scale.shape[1]
    if groups < 1 or in_features % groups:
        raise CheckpointError(f"the groups must divide the input width {in_features}: got {groups} groups.")
    codes = unpack_codes(folder.get(layer + PACKED, (out_features, words), torch.int32), bits, in_features)
    _check_order(folder, layer, in_features, groups)
    zero_point = torch.full((out_features, groups), 1 << (bits - 1))
    if f"{layer}.weight_zero_point" in folder.names:
        rows = num_words(out_features, bits)
        packed = folder.get(f"{layer}.weight_zero_point", (rows, groups), torch.int32)
        zero_point = unpack_codes(packed.T, bits, out_features).T
    return affine_weight(codes, scale, zero_point, bits=bits)


def _scale(folder: TensorFolder, layer: str, out_features: int) -> Tensor:
    """Scales ``[out, groups]``; one for the whole matrix is repeated for its rows."""
    name = f"{layer}.weight_scale"
    shape = folder.shape(name)
    if shape in ((1,), (1, 1), ()):
        return folder.get(name, shape, *FLOATS).reshape(1, 1).expand(out_features, 1)
    return folder.get(name, (out_features, *shape[1:2]), *FLOATS)


def _check_order(folder: TensorFolder, layer: str, in_features: int, groups: int) -> None:
    name = f"{layer}.weight_g_idx"
    if name not in folder.names:
        return
    index = folder.get(name, (in_features,), torch.int32, torch.int64).long()
    # -1 stands for "not reordered"
    if bool((index == -1).all()) or torch.equal(index, torch.arange(in_features) // (in_features // groups)):
        return
    raise ForeignModelError(
        "`weight_g_idx` must number groups of neighbouring columns: it does not, since the checkpoint was made with "
        "actorder='group'. Groups of scattered columns are no groups of ours. Start from one with actorder='static' "
        "or without."
    )


FORMAT = ImportFormat("compressed-tensors", "llm-compressor", _open)
