"""The block layouts of GGUF that can hold trained codes exactly, as plain functions on integers.

A block is a run of weights with one fp16 step `d`; a weight is ``d * step``, or ``d * level + m`` in Q4_1. Steps are
``code - zero_point``; where they do not fit, ``-d`` and the steps turned round may. Layouts as in llama.cpp's
`ggml-quants.c` and the `gguf` package, written anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdistiller_peft.export.affine import cast_exactly, refuse_not_affine, spread, zero_points
from bitdistiller_peft.export.source import PackedWeight

Q2_0_TYPE = 42  # newer than some releases of the `gguf` package


@dataclass(frozen=True)
class Blocks:
    """One matrix in blocks.

    Attributes:
        steps: int16 ``[out, blocks, block]``: steps from zero, or levels ``0 .. 15`` in Q4_1.
        d: fp16 ``[out, blocks]``.
        m: fp16 ``[out, blocks]``, Q4_1 only.
    """

    steps: Tensor
    d: Tensor
    m: Tensor | None = None


@dataclass(frozen=True)
class Carrier:
    """One block layout.

    Attributes:
        name: its name in GGUF.
        type_id: its number in GGUF.
        block: weights in a block.
        num_bytes: bytes in a block.
        low: smallest step, or level.
        high: largest one.
        pack: steps ``[..., block]`` moved to start at 0, uint8, to bytes ``[..., num_bytes - header]``.
        unpack: the inverse.
        d_last: the step stands behind the codes.
    """

    name: str
    type_id: int
    block: int
    num_bytes: int
    low: int
    high: int
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]
    d_last: bool = False

    @property
    def has_minimum(self) -> bool:
        """Whether a block stores an offset `m` beside `d`."""
        return self.name == "Q4_1"

    def encode(self, blocks: Blocks) -> Tensor:
        """Bytes of a matrix, uint8 ``[out, blocks * num_bytes]``."""
        body = self.pack((blocks.steps - self.low).to(torch.uint8))
        header = [
            number.unsqueeze(-1).contiguous().view(torch.uint8) for number in (blocks.d, blocks.m) if number is not None
        ]
        parts = [body, *header] if self.d_last else [*header, body]
        return torch.cat(parts, dim=-1).flatten(1)

    def decode(self, data: Tensor) -> Blocks:
        """Undo `encode`."""
        rows = data.reshape(len(data), -1, self.num_bytes)
        size = 4 if self.has_minimum else 2
        header, body = (rows[..., -size:], rows[..., :-size]) if self.d_last else (rows[..., :size], rows[..., size:])
        numbers = header.contiguous().view(torch.float16)
        steps = self.unpack(body).to(torch.int16) + self.low
        return Blocks(steps, numbers[..., 0], numbers[..., 1] if self.has_minimum else None)


def _weighted_sum(digits: Tensor, factors: list[int]) -> Tensor:
    """Sum ``[..., n, width]`` over n with weights."""
    return (digits.to(torch.int32) * torch.tensor(factors, dtype=torch.int32).unsqueeze(-1)).sum(-2)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """Byte k holds codes k (low) and k + 16 (high)."""
    low, high = torch.unflatten(codes, -1, (2, 16)).unbind(-2)
    return low | (high << 4)


def _unpack_nibbles(body: Tensor) -> Tensor:
    return torch.cat([body & 15, body >> 4], dim=-1)


def _pack_quarters(codes: Tensor) -> Tensor:
    """Byte k holds codes 4k .. 4k + 3, the first lowest."""
    parts = torch.unflatten(codes, -1, (-1, 4)).unbind(-1)
    return parts[0] | (parts[1] << 2) | (parts[2] << 4) | (parts[3] << 6)


def _unpack_quarters(body: Tensor) -> Tensor:
    return torch.stack([(body >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(-2)


def _pack_tq2(codes: Tensor) -> Tensor:
    """Byte k of each half holds codes k, k + 32, k + 64 and k + 96 of it."""
    parts = torch.unflatten(codes, -1, (2, 4, 32)).unbind(-2)
    return (parts[0] | (parts[1] << 2) | (parts[2] << 4) | (parts[3] << 6)).flatten(-2)


def _unpack_tq2(body: Tensor) -> Tensor:
    halves = torch.unflatten(body, -1, (2, 32))
    return torch.stack([(halves >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-2).flatten(-3)


# codes, number of digits in a byte, bytes: five ternary digits a byte, four in the last bytes
_TQ1_PARTS = ((0, 5, 32), (160, 5, 16), (240, 4, 4))


def _pack_tq1(codes: Tensor) -> Tensor:
    """A byte is the fraction ``digits / 3**5`` in 1/256, rounded up, so that multiplying by 3 yields digit by digit."""
    packed = []
    for start, digits, width in _TQ1_PARTS:
        part = torch.unflatten(codes[..., start : start + digits * width], -1, (digits, width))
        packed.append((_weighted_sum(part, [81, 27, 9, 3, 1][:digits]) * 256 + 242) // 243)
    return torch.cat(packed, dim=-1).to(torch.uint8)


def _unpack_tq1(body: Tensor) -> Tensor:
    codes, start = [], 0
    for _, digits, width in _TQ1_PARTS:
        part = body[..., start : start + width].to(torch.int32)
        codes += [(((part * factor) & 255) * 3) >> 8 for factor in (1, 3, 9, 27, 81)[:digits]]
        start += width
    return torch.cat(codes, dim=-1).to(torch.uint8)


def _signed(codes: Tensor) -> Tensor:
    """Between codes that start at 0 and signed bytes, both as uint8: the highest bit differs."""
    return codes ^ 0x80


CARRIERS = {
    carrier.name: carrier
    for carrier in (
        Carrier("TQ1_0", 34, 256, 54, -1, 1, _pack_tq1, _unpack_tq1, d_last=True),
        Carrier("TQ2_0", 35, 256, 66, -1, 2, _pack_tq2, _unpack_tq2, d_last=True),
        Carrier("Q2_0", Q2_0_TYPE, 64, 18, -1, 2, _pack_quarters, _unpack_quarters),
        Carrier("Q4_0", 2, 32, 18, -8, 7, _pack_nibbles, _unpack_nibbles),
        Carrier("Q4_1", 3, 32, 20, 0, 15, _pack_nibbles, _unpack_nibbles),
        Carrier("Q8_0", 8, 32, 34, -128, 127, _signed, _signed),
    )
}


def refuse(weight: PackedWeight, carrier: Carrier) -> str | None:
    """The reason why a carrier cannot hold a weight whatever its values, or `None`."""
    reason = refuse_not_affine(weight)
    if reason is not None:
        return reason
    if weight.group_width % carrier.block:
        return f"groups of {weight.group_width} weights are not made of {carrier.name} blocks of {carrier.block}"
    if cast_exactly(weight.params.scale, torch.float16) is None:
        return f"a {weight.spec.scale_dtype_name} scale is no float16 number. Train with scale_dtype='float16'"
    return None


def to_blocks(weight: PackedWeight, carrier: Carrier) -> Blocks | None:
    """A weight in the blocks of a carrier that `refuse` lets pass, or `None` if some step does not fit.

    Returns:
        Blocks whose ``d * step`` (``+ m``) are the very values of the weight.
    """
    shape = (weight.out_features, -1, carrier.block)
    scale = spread(weight.row_scale.to(torch.float16), carrier.block, weight.in_features)
    zero_point = spread(zero_points(weight), carrier.block, weight.in_features)
    codes = weight.codes.to(torch.int16).reshape(shape)
    if carrier.has_minimum:
        minimum = -scale.float() * zero_point
        m = cast_exactly(minimum, torch.float16)
        return None if m is None or int(codes.max()) > carrier.high else Blocks(codes, scale, m)
    steps = codes - zero_point.unsqueeze(-1)
    turned = (steps.amin(-1) < carrier.low) | (steps.amax(-1) > carrier.high)
    steps = torch.where(turned.unsqueeze(-1), -steps, steps)
    if int(steps.min()) < carrier.low or int(steps.max()) > carrier.high:
        return None
    return Blocks(steps, torch.where(turned, -scale, scale))
