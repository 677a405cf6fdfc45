"""The layouts that packed codes can have, behind one set of verbs.

``"bitstream"`` serves every code width; ``"base3"`` holds ternary codes at 1.6 instead of 2 bits.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from bitdistiller_peft.packing.base3 import check_base3, num_words_base3, pack_base3, unpack_base3
from bitdistiller_peft.packing.bitstream import check_tail, num_words, pack_codes, unpack_codes

Packing = Literal["bitstream", "base3"]
PACKINGS: tuple[Packing, ...] = ("bitstream", "base3")


def row_words(num_codes: int, bits: int, packing: Packing) -> int:
    """Count the int32 words that a row of codes takes."""
    return num_words_base3(num_codes) if packing == "base3" else num_words(num_codes, bits)


def pack_row(codes: Tensor, bits: int, packing: Packing) -> Tensor:
    """Pack codes ``[..., n]`` along the last axis: int32 ``[..., row_words(n, bits, packing)]``."""
    return pack_base3(codes) if packing == "base3" else pack_codes(codes, bits)


def unpack_row(words: Tensor, bits: int, num_codes: int, packing: Packing) -> Tensor:
    """Undo `pack_row`: uint8 ``[..., num_codes]``."""
    return unpack_base3(words, num_codes) if packing == "base3" else unpack_codes(words, bits, num_codes)


def check_row(words: Tensor, bits: int, num_codes: int, packing: Packing) -> None:
    """Refuse words that `pack_row` cannot have produced.

    Raises:
        CheckpointError: unused bits or digits that are not zero, or bytes that stand for no codes.
    """
    if packing == "base3":
        check_base3(words, num_codes)
    else:
        check_tail(words, bits, num_codes)
