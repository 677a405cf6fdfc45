"""Packed words are one little-endian bit stream per row, as Python's own integers say, and come back unchanged."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.packing import check_tail, num_words, pack_codes, unpack_codes
from tests.reference import quantization as reference

each_width = pytest.mark.parametrize("bits", range(1, 9))

rows = st.integers(1, 8).flatmap(
    lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), min_size=1, max_size=100))
)


def random_codes(bits: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)


@given(row=rows)
def test_any_row_is_packed_as_one_large_integer(row: tuple[int, list[int]]) -> None:
    bits, codes = row
    words = pack_codes(torch.tensor(codes, dtype=torch.uint8), bits)
    assert words.dtype == torch.int32
    assert words.tolist() == reference.pack(codes, bits)


@given(row=rows)
def test_any_row_comes_back(row: tuple[int, list[int]]) -> None:
    bits, codes = row
    words = pack_codes(torch.tensor(codes, dtype=torch.uint8), bits)
    got = unpack_codes(words, bits, len(codes))
    assert got.dtype == torch.uint8
    assert got.tolist() == codes == reference.unpack(words.tolist(), bits, len(codes))
    check_tail(words, bits, len(codes))


@given(
    words=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=9),
    bits=st.integers(1, 8),
    missing=st.integers(0, 3),
)
def test_any_words_are_read_as_one_large_integer(words: list[int], bits: int, missing: int) -> None:
    count = max(1, 32 * len(words) // bits - missing)
    got = unpack_codes(torch.tensor(words, dtype=torch.int32), bits, count)
    assert got.tolist() == reference.unpack(words, bits, count)


@given(row=rows, seed=st.integers(0, 99))
def test_the_tail_is_zero_and_one_set_bit_in_it_is_refused(row: tuple[int, list[int]], seed: int) -> None:
    bits, codes = row
    words = pack_codes(torch.tensor([codes, codes], dtype=torch.uint8), bits)
    used = len(codes) * bits % 32
    if not used:
        return
    unused = words[..., -1].to(torch.int64) % 2**32 >> used
    assert unused.tolist() == [0, 0]
    bit = used + seed % (32 - used)
    words[seed % 2, -1] ^= (1 << bit) - (1 << 32 if bit == 31 else 0)
    with pytest.raises(CheckpointError, match=f"last of {len(codes)} {bits}-bit codes must be 0"):
        check_tail(words, bits, len(codes))


@each_width
def test_the_largest_codes_fill_every_bit(bits: int) -> None:
    words = pack_codes(torch.full((32,), 2**bits - 1, dtype=torch.uint8), bits)
    assert words.tolist() == [-1] * bits


@each_width
@pytest.mark.parametrize("count", [1, 10, 11, 32, 43, 100, 172])
def test_words_are_counted_without_waste(bits: int, count: int) -> None:
    assert num_words(count, bits) == (count * bits + 31) // 32
    assert pack_codes(random_codes(bits, 2, count), bits).shape == (2, num_words(count, bits))


def test_three_bit_codes_straddle_words() -> None:
    codes = torch.zeros(12, dtype=torch.uint8)
    codes[10] = 0b110  # bits 30 to 32: the lowest two end the first word, the highest begins the second
    words = pack_codes(codes, 3)
    assert words.tolist() == [-(2**31), 1]
    assert unpack_codes(words, 3, 12).tolist() == codes.tolist()


def test_a_code_sits_at_its_place_from_the_low_end() -> None:
    assert pack_codes(torch.tensor([1, 2, 3]), 2).tolist() == [0b111001]
    assert pack_codes(torch.tensor([0xAB, 0xCD]), 8).tolist() == [0xCDAB]


@each_width
def test_each_row_is_packed_on_its_own_whatever_the_shape(bits: int) -> None:
    codes = random_codes(bits, 2, 3, 43)
    words = pack_codes(codes, bits)
    assert words.shape == (2, 3, num_words(43, bits))
    assert words.is_contiguous()
    assert torch.equal(words[1, 2], pack_codes(codes[1, 2], bits))
    assert torch.equal(unpack_codes(words, bits, 43), codes)


@each_width
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_is_packed_alike(bits: int, dtype: torch.dtype) -> None:
    codes = random_codes(min(bits, 7), 2, 43)
    assert torch.equal(pack_codes(codes.to(dtype), bits), pack_codes(codes, bits))


@each_width
def test_codes_that_are_not_contiguous_are_packed_like_their_copy(bits: int) -> None:
    codes = random_codes(bits, 43, 5).T
    words = pack_codes(codes, bits)
    assert torch.equal(words, pack_codes(codes.contiguous(), bits))
    strided = words.repeat_interleave(2, 0)[::2]
    assert torch.equal(unpack_codes(strided, bits, 43), codes)


@each_width
def test_no_codes_take_no_words(bits: int) -> None:
    words = pack_codes(torch.zeros(3, 0, dtype=torch.uint8), bits)
    assert words.shape == (3, 0)
    assert unpack_codes(words, bits, 0).shape == (3, 0)
    check_tail(words, bits, 0)


@each_width
def test_a_full_last_word_has_no_tail(bits: int) -> None:
    words = pack_codes(torch.full((32,), 2**bits - 1, dtype=torch.uint8), bits)
    check_tail(words, bits, 32)
