"""AWQ checkpoints (4 bits, GEMM layout), as AutoAWQ, GPTQModel and llm-compressor write them.

Eight codes of neighbouring output channels share a word, channel 0 2 4 6 1 3 5 7 from the lowest nibble up; zero
points likewise. AWQ's scaling is folded into the norms and weights before, so these differ from the base model's.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.importing.affine import affine_weight
from bitdistiller_peft.importing.folder import FLOATS, TensorFolder, choice
from bitdistiller_peft.importing.formats import ForeignModel, ImportedWeight, ImportFormat

BITS = 4
CHANNELS = 8  # in a word
NIBBLE_OF_CHANNEL = (0, 4, 1, 5, 2, 6, 3, 7)
SUFFIXES = (".qweight", ".qzeros", ".scales")


def _open(path: Path) -> ForeignModel:
    folder = TensorFolder(path)
    section = {"bits": folder.section.get("w_bit", BITS), "version": "gemm"} | folder.section
    choice(section, "bits", (BITS,), advice="AWQ has 4-bit codes.")
    section["version"] = str(section["version"]).lower()
    choice(section, "version", ("gemm",), advice="Other layouts are for one kernel; start from the GEMM checkpoint.")
    layers = {name.removesuffix(".qweight") for name in folder.names if name.endswith(".qweight")}
    return folder.model("awq", layers, SUFFIXES, partial(_read, folder))


def _read(folder: TensorFolder, layer: str, shape: tuple[int, int]) -> ImportedWeight:
    out_features, in_features = shape
    groups = folder.shape(f"{layer}.scales", 2)[0]
    if groups < 1 or in_features % groups or out_features % CHANNELS:
        raise CheckpointError(
            f"groups must divide the input width and {CHANNELS} the output width: got {groups} groups of a layer "
            f"{in_features} -> {out_features}."
        )
    words = out_features // CHANNELS
    qweight = folder.get(f"{layer}.qweight", (in_features, words), torch.int32)
    qzeros = folder.get(f"{layer}.qzeros", (groups, words), torch.int32)
    scales = folder.get(f"{layer}.scales", (groups, out_features), *FLOATS)
    return affine_weight(_unpack(qweight).T, scales.T, _unpack(qzeros).T, bits=BITS)


def _unpack(words: Tensor) -> Tensor:
    """int32 ``[rows, out / 8]`` to uint8 ``[rows, out]``."""
    shifts = BITS * torch.tensor(NIBBLE_OF_CHANNEL, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 15).to(torch.uint8).flatten(-2)


FORMAT = ImportFormat("awq", "AutoAWQ, GPTQModel", _open)
