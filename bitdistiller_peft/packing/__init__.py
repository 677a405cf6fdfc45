"""Codes <-> dense int32 words."""

from bitdistiller_peft.packing.bitstream import check_tail, num_words, pack_codes, unpack_codes

__all__ = ["check_tail", "num_words", "pack_codes", "unpack_codes"]
