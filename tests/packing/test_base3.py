"""Five ternary codes a byte: the arithmetic by hand, the way back for any codes, and damage that is found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.packing import (
    check_base3,
    check_row,
    num_words_base3,
    pack_base3,
    pack_row,
    row_words,
    unpack_base3,
    unpack_row,
)


def by_hand(codes: list[int]) -> list[int]:
    """Bytes by Horner's rule, words by Python's own little-endian bytes."""
    padded = codes + [0] * (-len(codes) % 20)
    data = bytearray()
    for start in range(0, len(padded), 5):
        value = 0
        for code in reversed(padded[start : start + 5]):
            value = value * 3 + code
        data.append(value)
    return [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, len(data), 4)]


ternary = st.lists(st.integers(0, 2), max_size=70)


@given(ternary)
def test_words_equal_the_arithmetic_by_hand_and_come_back(codes: list[int]) -> None:
    words = pack_base3(torch.tensor(codes, dtype=torch.uint8))
    assert words.dtype == torch.int32
    assert words.tolist() == by_hand(codes)
    assert words.shape[-1] == num_words_base3(len(codes))
    assert unpack_base3(words, len(codes)).tolist() == codes
    check_base3(words, len(codes))


def test_all_twos_fill_every_byte_to_242() -> None:
    assert pack_base3(torch.full((20,), 2)).tolist() == [int.from_bytes(bytes([242] * 4), "little", signed=True)]


def test_rows_are_packed_one_by_one(generator: torch.Generator) -> None:
    codes = torch.randint(0, 3, (2, 3, 43), generator=generator, dtype=torch.uint8)
    words = pack_base3(codes)
    assert words.shape == (2, 3, 3)
    assert torch.equal(words[1, 2], pack_base3(codes[1, 2]))
    assert torch.equal(unpack_base3(words, 43), codes)


def test_both_layouts_stand_behind_one_set_of_verbs(generator: torch.Generator) -> None:
    codes = torch.randint(0, 3, (4, 64), generator=generator, dtype=torch.uint8)
    assert [row_words(64, 2, "bitstream"), row_words(64, 2, "base3")] == [4, 4]
    assert [row_words(640, 2, "bitstream"), row_words(640, 2, "base3")] == [40, 32]
    for packing in ("bitstream", "base3"):
        words = pack_row(codes, 2, packing)
        check_row(words, 2, 64, packing)
        assert torch.equal(unpack_row(words, 2, 64, packing), codes)


@pytest.mark.parametrize(
    ("word", "message"),
    [(243, "at most 242: got 243"), (-1, "at most 242: got 255"), (3**2, "unused digits after the last of 2")],
)
def test_words_that_no_packing_wrote_are_refused(word: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_base3(torch.tensor([[0], [word]], dtype=torch.int32), 2)


def test_a_set_digit_in_the_last_byte_of_the_tail_is_found() -> None:
    with pytest.raises(CheckpointError, match="unused digits"):
        check_base3(torch.tensor([1 << 24], dtype=torch.int32), 15)
    check_base3(torch.tensor([1 << 24], dtype=torch.int32), 16)
