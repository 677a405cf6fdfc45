"""bitsandbytes NF4 checkpoints, as transformers saves a model that was loaded in 4 bits.

Two codes share a byte, the first in its upper half, over the flattened matrix; so do the blocks of one `absmax`, which
are our groups where they divide the rows. With double quantization, `absmax` is itself an 8-bit code in blocks of 256
plus an offset; what bitsandbytes makes of it in fp32 is our fp32 scale.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitdistiller_peft.errors import CheckpointError, ForeignModelError
from bitdistiller_peft.grids import PUBLISHED_NF4
from bitdistiller_peft.importing.affine import check_scales, storable
from bitdistiller_peft.importing.folder import TensorFolder, choice, refuse_entries
from bitdistiller_peft.importing.formats import ForeignModel, ImportedWeight, ImportFormat
from bitdistiller_peft.jsonfile import strict_json
from bitdistiller_peft.quantizers import QuantParams, QuantSpec

GRID, BITS = "nf4", 4
STATE = ".weight.quant_state.bitsandbytes__nf4"
_ENDINGS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
SUFFIXES = (*(f".weight{ending}" for ending in _ENDINGS), STATE)
_STORAGE = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
_NF4_ONLY = (
    "Only NF4 weights can be taken over: its FP4 has levels that no grid has, and int8 quantizes inputs as well."
)


def _open(path: Path) -> ForeignModel:
    folder = TensorFolder(path)
    refuse_entries(folder.section, {"load_in_8bit": _NF4_ONLY})
    choice(folder.section, "bnb_4bit_quant_type", ("nf4",), advice=_NF4_ONLY)
    layers = {name.removesuffix(STATE) for name in folder.names if name.endswith(STATE)}
    return folder.model("bitsandbytes", layers, SUFFIXES, partial(_read, folder))


def _read(folder: TensorFolder, layer: str, shape: tuple[int, int]) -> ImportedWeight:
    out_features, in_features = shape
    state = _state(folder, layer)
    block = _whole(state, "blocksize")
    if state.get("quant_type") != "nf4" or state.get("shape") != list(shape):
        raise CheckpointError(
            f"the quantization state must say quant_type 'nf4' and shape {list(shape)}: got "
            f"{str(state.get('quant_type'))[:40]!r} and {str(state.get('shape'))[:80]}. Download the model again."
        )
    if in_features % block:
        raise ForeignModelError(
            f"blocks of {block} weights must divide the rows of {in_features}: they do not, and a block that runs over "
            "the end of a row is no group of ours. Leave the layer out when the model is quantized."
        )
    expected = torch.tensor(PUBLISHED_NF4)
    if not torch.equal(folder.get(f"{layer}.weight.quant_map", (1 << BITS,), torch.float32), expected):
        raise ForeignModelError("'quant_map' must be the published NF4 table: it is another one. No grid holds it.")
    absmax = _absmax(folder, layer, state, out_features * in_features // block)
    scale = absmax.reshape(out_features, -1)
    check_scales(scale)
    if bool((scale < 0).any()):
        raise CheckpointError("'absmax' must not be negative: it is. The file is damaged; download it again.")
    codes = _codes(folder, layer, out_features * in_features).reshape(shape)
    empty = scale == 0
    codes[empty.repeat_interleave(block, 1)] = expected.tolist().index(0.0)
    spec = QuantSpec.create(GRID, BITS, group_size=block, scale_dtype="float32")
    return ImportedWeight(spec, codes, QuantParams(storable(torch.where(empty, 1.0, scale))))


def _codes(folder: TensorFolder, layer: str, count: int) -> Tensor:
    """All codes in a row, uint8; the bytes may be dressed up as another dtype (`bnb_4bit_quant_storage`)."""
    name = f"{layer}.weight"
    shape = folder.shape(name)
    data = folder.get(name, shape, *_STORAGE).contiguous().view(torch.uint8).flatten()
    if 2 * len(data) != count:
        raise CheckpointError(f"tensor {name!r} must hold {count} codes: got {2 * len(data)}. Download it again.")
    return torch.stack((data >> 4, data & 15), dim=-1).flatten()


def _absmax(folder: TensorFolder, layer: str, state: dict[str, Any], count: int) -> Tensor:
    name = f"{layer}.weight.absmax"
    if f"{layer}.weight.nested_absmax" not in folder.names:
        return folder.get(name, (count,), torch.float32)
    block, offset = _whole(state, "nested_blocksize"), state.get("nested_offset")
    if not isinstance(offset, float):
        raise CheckpointError(f"`nested_offset` must be a number: got {str(offset)[:40]!r}. Download the model again.")
    codes = folder.get(name, (count,), torch.uint8)
    table = folder.get(f"{layer}.weight.nested_quant_map", (256,), torch.float32)
    outer = folder.get(f"{layer}.weight.nested_absmax", (-(-count // block),), torch.float32)
    return table[codes.long()] * outer.repeat_interleave(block)[:count] + torch.tensor(offset, dtype=torch.float32)


def _state(folder: TensorFolder, layer: str) -> dict[str, Any]:
    """What bitsandbytes says about a weight: JSON, stored as bytes."""
    name = layer + STATE
    (size,) = folder.shape(name, 1)
    try:
        state = strict_json(bytes(folder.get(name, (size,), torch.uint8).tolist()))
    except ValueError as error:
        raise CheckpointError(f"tensor {name!r} must hold strict JSON: {error}. Download the model again.") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"tensor {name!r} must hold a JSON object: got {type(state).__name__}.")
    return state


def _whole(state: dict[str, Any], key: str) -> int:
    value = state.get(key)
    if type(value) is not int or not 1 <= value <= 1 << 20:
        raise CheckpointError(f"`{key}` must be a whole number from 1: got {str(value)[:40]!r}. Download it again.")
    return value


FORMAT = ImportFormat("bitsandbytes", "transformers with bitsandbytes", _open)
