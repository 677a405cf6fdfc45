"""A scale is stored rounded up, a learned one to nearest, as exact fractions say; what cannot be stored is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitdistiller_peft.errors import ScaleRangeError, WeightError
from bitdistiller_peft.quantizers import check_scale
from bitdistiller_peft.quantizers.rounding import round_scale_nearest, round_scale_up
from tests.quantizers.samples import SCALE_DTYPES, each_scale_dtype
from tests.reference import quantization as reference

non_negative = st.floats(0, 2.0**127, width=32)
any_sign = st.floats(-(2.0**100), 2.0**127, width=32)


def around_every_power(dtype: torch.dtype) -> Tensor:
    """For each exponent of fp16: numbers of the format, the middles between them, and their fp32 neighbours."""
    powers = torch.exp2(torch.arange(-14, 16, dtype=torch.float32))
    spacing = torch.finfo(dtype).eps
    points = torch.cat([powers * (1 + spacing * steps) for steps in (0, 0.5, 1, 1.5, 2)])
    sides = [torch.nextafter(points, torch.full_like(points, side)) for side in (0.0, torch.inf)]
    return torch.cat([points, *sides])


@each_scale_dtype
def test_rounding_up_is_exact_at_every_edge(scale_dtype: str) -> None:
    dtype = getattr(torch, scale_dtype)
    scales = around_every_power(dtype)
    wanted = [reference.store_up(scale, scale_dtype) for scale in scales.tolist()]
    assert round_scale_up(scales, dtype).double().tolist() == wanted


@each_scale_dtype
def test_rounding_to_nearest_is_exact_at_every_edge(scale_dtype: str) -> None:
    dtype = getattr(torch, scale_dtype)
    scales = around_every_power(dtype)
    wanted = [reference.store_nearest(scale, scale_dtype) for scale in scales.tolist()]
    assert round_scale_nearest(scales, dtype).double().tolist() == wanted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spare_bits", [1, 2, 3])
def test_spare_bits_are_zero_and_rounded_to_nearest(dtype: torch.dtype, spare_bits: int) -> None:
    stored = torch.arange(1, 0x7C00 if dtype == torch.float16 else 0x7F80, dtype=torch.int16).view(dtype)
    stored = stored[stored >= torch.finfo(dtype).tiny]
    found = round_scale_nearest(stored.float(), dtype, spare_bits=spare_bits)
    step = 1 << spare_bits
    wanted = [(pattern + step // 2) // step * step for pattern in stored.view(torch.int16).tolist()]  # half-way: up
    assert found.view(torch.int16).tolist() == wanted


@given(scales=st.lists(non_negative, min_size=1, max_size=8), scale_dtype=st.sampled_from(SCALE_DTYPES))
def test_any_scale_is_rounded_up_to_the_next_number_of_its_dtype(scales: list[float], scale_dtype: str) -> None:
    wanted = [reference.store_up(scale, scale_dtype) for scale in scales]
    stored = round_scale_up(torch.tensor(scales), getattr(torch, scale_dtype))
    assert stored.dtype == getattr(torch, scale_dtype)
    assert stored.double().tolist() == wanted


@given(scales=st.lists(any_sign, min_size=1, max_size=8), scale_dtype=st.sampled_from(["bfloat16", "float32"]))
def test_any_learned_scale_goes_to_the_nearest_number_but_stays_positive(scales: list[float], scale_dtype: str) -> None:
    wanted = [reference.store_nearest(scale, scale_dtype) for scale in scales]
    assert round_scale_nearest(torch.tensor(scales), getattr(torch, scale_dtype)).double().tolist() == wanted


@each_scale_dtype
def test_what_is_stored_already_is_stored_unchanged(scale_dtype: str) -> None:
    dtype = getattr(torch, scale_dtype)
    stored = round_scale_up(around_every_power(dtype), dtype)
    stored = stored[stored.isfinite()]
    assert torch.equal(round_scale_up(stored.float(), dtype), stored)
    assert torch.equal(round_scale_nearest(stored.float(), dtype), stored)


def test_a_scale_just_above_the_largest_fp16_overflows_instead_of_shrinking() -> None:
    assert round_scale_up(torch.tensor([65504.0]), torch.float16).item() == 65504.0
    assert round_scale_up(torch.tensor([65505.0]), torch.float16).item() == math.inf


@each_scale_dtype
def test_every_normal_scale_passes(scale_dtype: str) -> None:
    dtype = getattr(torch, scale_dtype)
    info = torch.finfo(dtype)
    check_scale(torch.tensor([info.tiny, 1.0, info.max], dtype=dtype))


@each_scale_dtype
def test_a_zero_passes_only_for_a_sign_that_may_be_absent(scale_dtype: str) -> None:
    zero = torch.zeros(2, dtype=getattr(torch, scale_dtype))
    check_scale(zero, allow_zero=True)
    with pytest.raises(ScaleRangeError, match=f"to be stored as {scale_dtype} without loss: got 0"):
        check_scale(zero)


@each_scale_dtype
@pytest.mark.parametrize("allow_zero", [False, True])
def test_subnormal_negative_infinite_and_nan_are_refused(scale_dtype: str, allow_zero: bool) -> None:
    dtype = getattr(torch, scale_dtype)

    def among_good_ones(bad: float) -> Tensor:
        return torch.tensor([1.0, bad, 2.0], dtype=dtype)

    with pytest.raises(ScaleRangeError, match="at least"):
        check_scale(among_good_ones(torch.finfo(dtype).smallest_normal / 2), allow_zero=allow_zero)
    with pytest.raises(ScaleRangeError, match="at least"):
        check_scale(among_good_ones(-1.0), allow_zero=allow_zero)
    with pytest.raises(ScaleRangeError, match="at most"):
        check_scale(among_good_ones(math.inf), allow_zero=allow_zero)
    with pytest.raises(WeightError, match="NaN"):
        check_scale(among_good_ones(math.nan), allow_zero=allow_zero)
