"""What holds for every grid, width and dtype, on weights that hypothesis makes up: 20,000 of them at night."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitdistiller_peft.errors import ConfigError, WeightError
from bitdistiller_peft.grids import AffineGrid, CodebookGrid, get_grid, grid_names
from bitdistiller_peft.kernels import dequantize_packed
from bitdistiller_peft.layers import PackedLinear
from bitdistiller_peft.layers.companions import packed_params
from bitdistiller_peft.packing import check_tail, num_words, pack_codes, unpack_codes
from bitdistiller_peft.quantizers import QuantSpec, dequantize, fake_quantize, find_params, quantize
from tests.quantizers.samples import SCALE_DTYPES, matrices, steps, widest_gap


def all_kinds() -> list[tuple[str, int]]:
    """Every width of every registered grid: a new one is tested by being registered."""
    kinds = []
    for name in grid_names():
        for bits in range(1, 9):
            try:
                get_grid(name, bits)
            except ConfigError:
                continue
            kinds.append((name, bits))
    return kinds


KINDS = all_kinds()
GROUP_SIZES: list[int | str] = [-1, 1, 2, 3, 4, 6, 12, "tensor"]
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def holds_zero(spec: QuantSpec) -> bool:
    return isinstance(spec.grid, (AffineGrid, CodebookGrid))


def spans_the_range(spec: QuantSpec) -> bool:
    """Whether the ends of a group are on the grid (min-max), so that a bound on the error is promised."""
    return isinstance(spec.grid, CodebookGrid) or type(spec.grid) is AffineGrid


def make_spec(kind: tuple[str, int], size: int | str, dtype: str) -> QuantSpec:
    return QuantSpec.create(*kind, group_size=size, scale_dtype=dtype)


specs = st.builds(make_spec, st.sampled_from(KINDS), st.sampled_from(GROUP_SIZES), st.sampled_from(SCALE_DTYPES))
weights = st.builds(lambda weight, dtype: weight.to(dtype), matrices, st.sampled_from(WEIGHT_DTYPES))
any_bits = st.integers(0, 2**32 - 1).map(lambda n: n - (1 << 32) if n >= 1 << 31 else n)
special = st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.2e-38, 65504.0, -65520.0, 3.4e38, math.inf, -math.inf, math.nan])
wild = st.one_of(special, st.floats(width=32), st.floats(-4, 4, width=32), st.floats(2.0**-100, 2.0**-66, width=32))
wild_rows = st.one_of(st.lists(wild, min_size=12, max_size=12), wild.map(lambda value: [value] * 12))


@st.composite
def code_rows(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits, width = draw(st.integers(1, 8)), draw(st.integers(1, 70))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=width, max_size=width)
    return bits, draw(st.lists(row, min_size=1, max_size=3))


@given(case=code_rows())
def test_codes_of_any_width_come_back_from_the_words_that_they_take(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    words = pack_codes(torch.tensor(rows), bits)
    assert words.dtype == torch.int32
    assert words.shape == (len(rows), num_words(len(rows[0]), bits))
    assert unpack_codes(words, bits, len(rows[0])).tolist() == rows
    check_tail(words, bits, len(rows[0]))


@given(weight=weights, spec=specs)
def test_what_is_trained_is_what_is_packed(weight: Tensor, spec: QuantSpec) -> None:
    params = find_params(weight, spec)
    codes = quantize(weight, params, spec)
    layer = PackedLinear.from_codes(codes, params, spec)
    unpacked = dequantize_packed(layer.weight, packed_params(layer, "weight"), spec, weight.shape[-1], torch.float32)
    assert torch.equal(fake_quantize(weight, spec), unpacked)
    assert torch.equal(dequantize(codes, params, spec), unpacked)
    assert int(codes.max()) < spec.grid.num_levels


@given(weight=matrices, spec=specs)
def test_what_is_on_the_grid_stays_there(weight: Tensor, spec: QuantSpec) -> None:
    params = find_params(weight, spec)
    codes = quantize(weight, params, spec)
    values = dequantize(codes, params, spec)
    assert torch.equal(dequantize(quantize(values, params, spec), params, spec), values)


@given(weight=matrices, spec=specs, zeros=st.lists(st.integers(0, 11), max_size=12))
def test_zero_stays_zero(weight: Tensor, spec: QuantSpec, zeros: list[int]) -> None:
    weight[:, zeros] = 0.0
    if holds_zero(spec):
        assert not fake_quantize(weight, spec)[weight == 0].any()


def assert_half_a_step(weight: Tensor, spec: QuantSpec) -> None:
    params = find_params(weight, spec)
    error = (fake_quantize(weight, spec).double() - weight.double()).abs()
    # the arithmetic itself is fp32: one part in 2**23 of the weight and of the step
    slack = (weight.double().abs() + steps(params, weight, spec)) * 2.0**-21
    assert bool((error <= widest_gap(spec) / 2 * steps(params, weight, spec) + slack).all())


@given(weight=matrices, spec=specs)
def test_no_weight_moves_more_than_half_a_step(weight: Tensor, spec: QuantSpec) -> None:
    if spans_the_range(spec):
        assert_half_a_step(weight, spec)


@given(rows=st.lists(wild_rows, min_size=1, max_size=3), spec=specs)
def test_any_floats_are_quantized_within_the_bound_or_refused_by_name(rows: list[list[float]], spec: QuantSpec) -> None:
    weight = torch.tensor(rows, dtype=torch.float32)
    try:
        values = dequantize(quantize(weight, params := find_params(weight, spec), spec), params, spec)
    except WeightError:
        return
    assert bool(weight.isfinite().all())
    assert bool(values.isfinite().all())
    if spans_the_range(spec):
        assert_half_a_step(weight, spec)


@given(weight=matrices, kind=st.sampled_from(KINDS), dtype=st.sampled_from(SCALE_DTYPES), seed=st.integers(0, 99))
def test_rows_do_not_know_of_each_other(weight: Tensor, kind: tuple[str, int], dtype: str, seed: int) -> None:
    spec = make_spec(kind, 6, dtype)
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(fake_quantize(weight, spec)[order], fake_quantize(weight[order], spec))


@given(
    kind=st.sampled_from(KINDS),
    width=st.integers(1, 41),
    sign=st.sampled_from([-1.0, 1.0]),
    constant=st.booleans(),
    seed=st.integers(0, 999),
)
def test_odd_widths_of_one_sign_are_packed_as_they_are_trained(
    kind: tuple[str, int], width: int, sign: float, constant: bool, seed: int
) -> None:
    spec = make_spec(kind, -1, "float16")
    weight = sign * (torch.rand(2, width, generator=torch.Generator().manual_seed(seed)) + 0.05)
    weight = weight[:, :1].expand(2, width).contiguous() if constant else weight
    params = find_params(weight, spec)
    codes = quantize(weight, params, spec)
    layer = PackedLinear.from_codes(codes, params, spec)
    assert torch.equal(layer.dequantize(), fake_quantize(weight, spec))
    if spans_the_range(spec):
        assert_half_a_step(weight, spec)


@given(weight=matrices, spec=specs, dtype=st.sampled_from(WEIGHT_DTYPES))
def test_the_dtype_of_a_weight_adds_nothing_to_its_values(weight: Tensor, spec: QuantSpec, dtype: torch.dtype) -> None:
    narrow = weight.to(dtype)
    assert torch.equal(fake_quantize(narrow, spec), fake_quantize(narrow.float(), spec))


@given(weight=matrices, spec=specs)
def test_the_same_weight_gives_the_same_bits(weight: Tensor, spec: QuantSpec) -> None:
    first, second = find_params(weight, spec), find_params(weight.clone(), spec)
    for one, other in zip(first, second, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    assert torch.equal(quantize(weight, first, spec), quantize(weight, second, spec))


@given(bits=st.integers(1, 8), words=st.lists(any_bits, min_size=1, max_size=6), count=st.integers(1, 200))
def test_any_words_are_read_or_refused_never_more_than_is_there(bits: int, words: list[int], count: int) -> None:
    count = min(count, len(words) * 32 // bits)
    stored = torch.tensor([words], dtype=torch.int32)[:, : num_words(count, bits)] if count else None
    if stored is not None:
        codes = unpack_codes(stored, bits, count)
        assert codes.shape == (1, count)
        assert int(codes.max()) < 1 << bits


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_refused_on_every_grid(kind: tuple[str, int], value: float) -> None:
    weight = torch.ones(3, 12)
    weight[1, 7] = value
    with pytest.raises(WeightError, match="must be finite"):
        find_params(weight, make_spec(kind, 6, "float32"))
