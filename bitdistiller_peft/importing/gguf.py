"""GGUF files of llama.cpp whose blocks are affine: Q4_0, Q8_0, Q2_0, TQ1_0, TQ2_0, and Q4_1 where the minimum allows.

A block is one fp16 step `d` and integers, so it is a group of ours; a negative `d` turns its codes round. Embeddings
and the output head are dequantized. K-quants hold their scales as products of two numbers and are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bitdistiller_peft.errors import BitDistillerError, CheckpointError, ForeignModelError, add_location
from bitdistiller_peft.importing.affine import affine_weight
from bitdistiller_peft.importing.formats import ForeignModel, ImportedWeight, ImportFormat
from bitdistiller_peft.importing.gguf_file import GgufFile
from bitdistiller_peft.importing.gguf_model import model_config, row_order, transformers_names

_FLOATS = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


@dataclass(frozen=True)
class Blocks:
    """One type of blocks.

    Attributes:
        name: in GGUF.
        size: weights in a block.
        num_bytes: bytes in a block.
        bits: width of our codes.
        zero_point: the code that stands for 0.
        body: where the codes lie among the bytes.
        step: where `d` lies.
        unpack: bytes ``[..., n]`` to codes ``[..., size]``.
    """

    name: str
    size: int
    num_bytes: int
    bits: int
    zero_point: int
    body: slice
    step: slice
    unpack: Callable[[Tensor], Tensor]


def _nibbles(body: Tensor) -> Tensor:
    """Lower halves of 16 bytes first."""
    return torch.cat((body & 15, body >> 4), dim=-1)


def _quarters(body: Tensor) -> Tensor:
    """Four codes of a byte side by side, the lowest bits first."""
    return torch.stack([(body >> (2 * place)) & 3 for place in range(4)], dim=-1).flatten(-2)


def _strided_quarters(body: Tensor) -> Tensor:
    """32 bytes at a time: their lowest two bits, then the next."""
    halves = torch.unflatten(body, -1, (2, 32))
    return torch.stack([(halves >> (2 * place)) & 3 for place in range(4)], dim=-2).flatten(-3)


def _fractions(body: Tensor) -> Tensor:
    """Bytes as fractions in 1/256: three times one is a ternary digit, and what is left the next."""
    parts = ((body[..., :32], 5), (body[..., 32:48], 5), (body[..., 48:], 4))
    digits = [((part.int() * 3**place % 256) * 3) // 256 for part, count in parts for place in range(count)]
    return torch.cat(digits, dim=-1)


def _bytes(body: Tensor) -> Tensor:
    """Signed bytes, moved up to start at 0."""
    return body.contiguous().view(torch.int8).to(torch.int16) + 128


Q4_1 = 3
TYPES = {
    2: Blocks("Q4_0", 32, 18, 4, 8, slice(2, 18), slice(0, 2), _nibbles),
    Q4_1: Blocks("Q4_1", 32, 20, 4, 0, slice(4, 20), slice(0, 2), _nibbles),
    8: Blocks("Q8_0", 32, 34, 8, 128, slice(2, 34), slice(0, 2), _bytes),
    34: Blocks("TQ1_0", 256, 54, 2, 1, slice(0, 52), slice(52, 54), _fractions),
    35: Blocks("TQ2_0", 256, 66, 2, 1, slice(0, 64), slice(64, 66), _strided_quarters),
    42: Blocks("Q2_0", 64, 18, 2, 1, slice(2, 18), slice(0, 2), _quarters),
}
_TERNARY = ("TQ1_0", "TQ2_0")
_HELD = ", ".join(sorted(kind.name for kind in TYPES.values()))


def _sizes() -> dict[int, tuple[int, int]]:
    """Weights and bytes of a block of every type that is known here or to the `gguf` package."""
    import gguf

    known = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    return known | {type_id: (kind.size, kind.num_bytes) for type_id, kind in TYPES.items()}


def _open(path: Path) -> ForeignModel:
    file = GgufFile(path, _sizes())
    config = model_config(file)
    names = transformers_names(file)
    is_layer = {
        name: len(file.tensors[theirs].shape) == 2
        and file.tensors[theirs].type_id not in _FLOATS
        and ".layers." in name
        for name, theirs in names.items()
    }
    order = row_order(file)

    def read(layer: str, shape: tuple[int, int]) -> ImportedWeight:
        try:
            return _read(file, names[f"{layer}.weight"], shape, partial(order, layer))
        except BitDistillerError as error:
            raise add_location(error, f"layer {layer!r}") from None

    return ForeignModel(
        "gguf",
        config,
        tuple(sorted(name.removesuffix(".weight") for name in names if is_layer[name])),
        tuple(sorted(name for name in names if not is_layer[name])),
        read,
        lambda name: order(name.rpartition(".")[0], _dense(file, names[name])),
        lambda layer, shape: order(layer, _dense(file, names[f"{layer}.weight"])),
    )


def _read(file: GgufFile, name: str, shape: tuple[int, int], order: Callable[[Tensor], Tensor]) -> ImportedWeight:
    found = file.tensors[name]
    if found.shape != shape:
        raise CheckpointError(f"tensor {name!r} must have shape {list(shape)}: got {list(found.shape)}.")
    if found.type_id not in TYPES:
        raise ForeignModelError(
            f"the weights must be of a type whose steps are ours ({_HELD}): got {_type_name(found.type_id)}. Start "
            "from such a file, or leave these layers as they are, dequantized, with exclude_modules."
        )
    kind = TYPES[found.type_id]
    data = order(file.data(name)).reshape(shape[0], -1, kind.num_bytes)
    codes = kind.unpack(data[..., kind.body]).flatten(1)
    step = data[..., kind.step].contiguous().view(torch.float16).squeeze(-1)
    zero_point = torch.full(step.shape, kind.zero_point, dtype=torch.int16)
    if found.type_id == Q4_1:
        zero_point = _minimum_as_zero_point(step, data[..., 2:4].contiguous().view(torch.float16).squeeze(-1))
    is_ternary = kind.name in _TERNARY and int(codes.max()) < 3  # TQ2_0 has room for a fourth level
    return affine_weight(codes, step, zero_point, bits=kind.bits, grid="ternary" if is_ternary else "int")


def _minimum_as_zero_point(step: Tensor, minimum: Tensor) -> Tensor:
    """Zero points that say what minima say, in whole steps.

    Raises:
        ForeignModelError: a minimum is no multiple of its step.
    """
    wide, low = step.float(), minimum.float()
    zero_point = torch.round(-low / torch.where(wide == 0, 1.0, wide))
    if not torch.equal(wide * zero_point, -low) or int(zero_point.abs().max()) > 15:
        raise ForeignModelError(
            "every minimum of Q4_1 must be a multiple of its step, from 0 to -15: one is not, so zero lies between two "
            "codes and no grid of ours holds it. Start from a Q4_0 file."
        )
    return zero_point.to(torch.int16)


def _dense(file: GgufFile, name: str) -> Tensor:
    """A tensor in fp32, or in the 16-bit dtype that it is stored in."""
    found = file.tensors[name]
    if found.type_id in _FLOATS:
        return file.data(name).view(_FLOATS[found.type_id]).reshape(found.shape)
    import gguf

    try:
        values = gguf.quants.dequantize(file.data(name).numpy(), gguf.GGMLQuantizationType(found.type_id))
    except (NotImplementedError, ValueError):
        raise ForeignModelError(
            f"tensor {name!r} must be of a type that the `gguf` package dequantizes: got type "
            f"{_type_name(found.type_id)}. Write the file with another type for it."
        ) from None
    return torch.from_numpy(values).reshape(found.shape)


def _type_name(type_id: int) -> str:
    import gguf

    known = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    return str(known.get(type_id, type_id))


FORMAT = ImportFormat("gguf", "llama.cpp", _open, packages=("gguf",))
