"""Codes to dense int32 words and back.

Each row is one little-endian bit stream: code ``i`` takes the bits ``i * bits .. (i + 1) * bits - 1`` counted from the
lowest bit of the first word. A 3-bit code may straddle two words. A row starts on a word boundary; the bits left over
at its end are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.errors import CheckpointError

WORD_BITS = 32
_LOW_WORD = 0xFFFFFFFF


def num_words(num_codes: int, bits: int) -> int:
    """Count the int32 words that a row of codes takes."""
    return -(-num_codes * bits // WORD_BITS)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes densely along the last axis.

    Args:
        codes: integers ``0 .. 2**bits - 1``, ``[..., n]``, any integer dtype.
        bits: 1 to 8.

    Returns:
        int32 ``[..., ceil(n * bits / 32)]``.
    """
    num_codes = codes.shape[-1]
    words = torch.zeros(*codes.shape[:-1], num_words(num_codes, bits) + 1, dtype=torch.int64, device=codes.device)
    word, offset = _positions(num_codes, bits, codes.device)
    shifted = codes.to(torch.int64) << offset
    # codes never overlap, so adding is the same as or-ing
    words.index_add_(-1, word, shifted & _LOW_WORD)
    words.index_add_(-1, word + 1, shifted >> WORD_BITS)
    return words[..., :-1].to(torch.int32).contiguous()  # keeps the low 32 bits, sign or not


def unpack_codes(words: Tensor, bits: int, num_codes: int) -> Tensor:
    """Undo `pack_codes`.

    Args:
        words: int32 ``[..., ceil(num_codes * bits / 32)]``.
        bits: 1 to 8.
        num_codes: codes in a row.

    Returns:
        uint8 ``[..., num_codes]``.
    """
    mask = (1 << bits) - 1
    if WORD_BITS % bits == 0:
        shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)
        # the arithmetic shift copies the sign bit downwards; the mask removes the copies
        codes = (words.unsqueeze(-1) >> shifts) & mask
        return codes.to(torch.uint8).flatten(-2)[..., :num_codes]
    wide = torch.nn.functional.pad(words.to(torch.int64) & _LOW_WORD, (0, 1))
    word, offset = _positions(num_codes, bits, words.device)
    low = wide.index_select(-1, word) >> offset
    high = wide.index_select(-1, word + 1) << (WORD_BITS - offset)
    return ((low | high) & mask).to(torch.uint8)


def check_tail(words: Tensor, bits: int, num_codes: int) -> None:
    """Refuse words whose unused bits are not zero.

    Raises:
        CheckpointError: a bit after the last code is set.
    """
    used = num_codes * bits % WORD_BITS
    if used and bool(((words[..., -1].to(torch.int64) & _LOW_WORD) >> used).any()):
        raise CheckpointError(
            f"the unused bits after the last of {num_codes} {bits}-bit codes must be 0: got other bits. The file is "
            "damaged or was written by another tool; download it again."
        )


def _positions(num_codes: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    start = torch.arange(num_codes, dtype=torch.int64, device=device) * bits
    return start // WORD_BITS, start % WORD_BITS
