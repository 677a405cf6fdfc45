"""GPTQ checkpoints, v1 and v2, as GPTQModel, AutoGPTQ and AutoRound write them.

Codes lie along the input axis and zero points along the output axis, both as dense little-endian streams. Version 1
stores ``zero_point - 1``. `g_idx` says which group a column belongs to; only groups that lie side by side are ours.
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

SUFFIXES = (".qweight", ".qzeros", ".scales", ".g_idx")
V1, V2 = "gptq", "gptq_v2"
_MORE = {
    "rotation": "Its inputs are rotated as well; start from a checkpoint without rotation.",
    "is_marlin_format": "Its codes are laid out for one kernel; start from the original GPTQ checkpoint.",
}


def _open(path: Path) -> ForeignModel:
    folder = TensorFolder(path)
    section = folder.section
    choice(section, "bits", WIDTHS[2:] + WIDTHS[:2], advice="GPTQ codes of 2, 3, 4 and 8 bits can be taken over.")
    refuse_entries(section, _MORE)
    choice(section, "pack_dtype", ("int32",), advice="Pack the model in int32 words.")
    layout = {"layout": _layout(section)}
    choice(layout, "layout", (V1, V2), advice="Layouts for one kernel are not read; start from 'gptq' or 'gptq_v2'.")
    layers = {name.removesuffix(".qweight") for name in folder.names if name.endswith(".qweight")}
    return folder.model("gptq", layers, SUFFIXES, partial(_read, folder))


def _read(folder: TensorFolder, layer: str, shape: tuple[int, int]) -> ImportedWeight:
    out_features, in_features = shape
    bits, groups = _width(folder, layer, in_features), folder.shape(f"{layer}.scales", 2)[0]
    if groups < 1 or in_features % groups:
        raise CheckpointError(f"the groups must divide the input width {in_features}: got {groups} groups.")
    qweight = folder.get(f"{layer}.qweight", (num_words(in_features, bits), out_features), torch.int32)
    qzeros = folder.get(f"{layer}.qzeros", (groups, num_words(out_features, bits)), torch.int32)
    scales = folder.get(f"{layer}.scales", (groups, out_features), *FLOATS)
    if f"{layer}.g_idx" in folder.names:
        _check_order(folder.get(f"{layer}.g_idx", (in_features,), torch.int32, torch.int64), groups)
    zero_point = unpack_codes(qzeros, bits, out_features).T.to(torch.int16)
    if _layout(folder.section) == V1:
        zero_point = zero_point + 1
        if bool((zero_point == 1 << bits).any()):
            raise ForeignModelError(
                f"a zero point of version 1 must be stored as 0 .. {(1 << bits) - 2}: got {(1 << bits) - 1}, which "
                "some readers take for -1 + 1 and others do not. Start from a checkpoint_format='gptq_v2' checkpoint."
            )
    return affine_weight(unpack_codes(qweight.T, bits, in_features), scales.T, zero_point, bits=bits)


def _layout(section: Mapping[str, Any]) -> Any:
    """What config.json calls `checkpoint_format`, or `format` in some releases of GPTQModel."""
    return section.get("checkpoint_format") or section.get("format") or V1


def _width(folder: TensorFolder, layer: str, in_features: int) -> int:
    """The width of a layer's codes, which may differ from the common one where the config is `dynamic`."""
    words = folder.shape(f"{layer}.qweight", 2)[0]
    found = [bits for bits in WIDTHS if num_words(in_features, bits) == words]
    common = folder.section.get("bits", WIDTHS[2])
    if common in found:
        return int(common)
    if not found or not folder.section.get("dynamic"):
        raise CheckpointError(
            f"'qweight' must hold {num_words(in_features, common)} rows, {in_features} codes of {common} bits: got "
            f"{words}. config.json and weights do not belong together; download both again."
        )
    return found[0]


def _check_order(index: Tensor, groups: int) -> None:
    width = len(index) // groups
    if torch.equal(index.long(), torch.arange(len(index)) // width):
        return
    raise ForeignModelError(
        f"`g_idx` must number groups of {width} neighbouring columns: it does not, since the checkpoint was made with "
        "desc_act=True. Groups of scattered columns are no groups of ours. Start from a checkpoint with "
        "desc_act=False, with group_size=-1, or with static_groups=True."
    )


FORMAT = ImportFormat("gptq", "GPTQModel, AutoGPTQ, AutoRound", _open)
