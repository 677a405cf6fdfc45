"""Ternary codes to dense int32 words and back: five codes a byte, 1.6 bits a code.

Codes 0, 1, 2 are the digits of a number to base 3, the first code the lowest:
``byte = c0 + 3 c1 + 9 c2 + 27 c3 + 81 c4`` is at most 242. Four bytes make a word, the first the lowest. A row starts
on a word boundary; the digits left over at its end are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitdistiller_peft.errors import CheckpointError

CODES_PER_BYTE = 5
CODES_PER_WORD = 20
NUM_BYTES = 3**CODES_PER_BYTE
"""Bytes in use: 243 of 256."""

_DIGITS = tuple(3**i for i in range(CODES_PER_BYTE))
_BYTE_SHIFTS = (0, 8, 16, 24)


def num_words_base3(num_codes: int) -> int:
    """Count the int32 words that a row of codes takes."""
    return -(-num_codes // CODES_PER_WORD)


def pack_base3(codes: Tensor) -> Tensor:
    """Pack ternary codes densely along the last axis.

    Args:
        codes: integers 0, 1 and 2, ``[..., n]``, any integer dtype.

    Returns:
        int32 ``[..., ceil(n / 20)]``.
    """
    num_codes = codes.shape[-1]
    words = num_words_base3(num_codes)
    digits = torch.nn.functional.pad(codes.to(torch.int64), (0, words * CODES_PER_WORD - num_codes))
    digits = digits.reshape(*digits.shape[:-1], words, len(_BYTE_SHIFTS), CODES_PER_BYTE)
    in_bytes = (digits * torch.tensor(_DIGITS, device=codes.device)).sum(-1)
    packed = (in_bytes << torch.tensor(_BYTE_SHIFTS, device=codes.device)).sum(-1)
    return packed.to(torch.int32).contiguous()  # keeps the low 32 bits, sign or not


def unpack_base3(words: Tensor, num_codes: int) -> Tensor:
    """Undo `pack_base3`.

    Args:
        words: int32 ``[..., ceil(num_codes / 20)]``.
        num_codes: codes in a row.

    Returns:
        uint8 ``[..., num_codes]``.
    """
    return _digits(_bytes(words))[..., :num_codes]


def check_base3(words: Tensor, num_codes: int) -> None:
    """Refuse words that no packing can have produced.

    Raises:
        CheckpointError: a byte beyond 242, or digits after the last code that are not zero.
    """
    in_bytes = _bytes(words)
    if bool((in_bytes >= NUM_BYTES).any()):
        raise CheckpointError(
            f"every byte of packing 'base3' must be at most {NUM_BYTES - 1}: got {int(in_bytes.max())}. The file is "
            "damaged or was written by another tool; download it again."
        )
    if bool(_digits(in_bytes)[..., num_codes:].any()):
        raise CheckpointError(
            f"the unused digits after the last of {num_codes} ternary codes must be 0: got other digits. The file is "
            "damaged or was written by another tool; download it again."
        )


def _bytes(words: Tensor) -> Tensor:
    """The bytes of words ``[..., n]``, the lowest first: int32 ``[..., 4 * n]``."""
    shifts = torch.tensor(_BYTE_SHIFTS, dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(-1) >> shifts) & 0xFF).flatten(-2)


def _digits(in_bytes: Tensor) -> Tensor:
    """The five digits of each byte ``[..., n]``: uint8 ``[..., 5 * n]``."""
    table = torch.arange(256, device=in_bytes.device).unsqueeze(-1)
    table = (table // torch.tensor(_DIGITS, device=in_bytes.device) % 3).to(torch.uint8)
    return table[in_bytes.long()].flatten(-2)
