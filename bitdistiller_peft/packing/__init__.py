"""Codes <-> dense int32 words."""

from bitdistiller_peft.packing.base3 import check_base3, num_words_base3, pack_base3, unpack_base3
from bitdistiller_peft.packing.bitstream import check_tail, num_words, pack_codes, unpack_codes
from bitdistiller_peft.packing.layout import PACKINGS, Packing, check_row, pack_row, row_words, unpack_row

__all__ = [
    "PACKINGS",
    "Packing",
    "check_base3",
    "check_row",
    "check_tail",
    "num_words",
    "num_words_base3",
    "pack_base3",
    "pack_codes",
    "pack_row",
    "row_words",
    "unpack_base3",
    "unpack_codes",
    "unpack_row",
]
