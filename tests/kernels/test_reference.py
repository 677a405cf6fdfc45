"""The reference backend gives the fake-quantized weight bit for bit, tile by tile, and multiplies as `linear` does."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bitdistiller_peft.kernels import (
    compute_dtype,
    dequantize_packed,
    fake_quantize,
    packed_linear,
    quantize,
    reference,
    use_backend,
)
from bitdistiller_peft.packing import pack_codes
from bitdistiller_peft.quantizers import QuantParams, QuantSpec, find_params
from tests.quantizers.samples import each_grid, each_scale_dtype, hard_weight, normal

each_group_size = pytest.mark.parametrize("group_size", [-1, 4, 12, "tensor"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def _on_the_reference() -> object:
    with use_backend("reference"):
        yield


def packed(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, QuantParams]:
    params = find_params(weight, spec)
    words = pack_codes(quantize(weight, params, spec), spec.grid.bits)
    if params.zero_point is not None:
        params = params._replace(zero_point=pack_codes(params.zero_point, spec.grid.bits))
    return words, params


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[object]:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


@each_grid
@each_group_size
@each_dtype
def test_a_packed_weight_is_the_fake_quantized_one_rounded_once(
    grid: str, bits: int, group_size: int | str, dtype: torch.dtype
) -> None:
    spec = QuantSpec.create(grid, bits, group_size=group_size)
    weight = hard_weight()
    words, params = packed(weight, spec)
    got = dequantize_packed(words, params, spec, weight.shape[1], dtype)
    assert got.dtype == dtype
    assert torch.equal(got, fake_quantize(weight, spec).to(dtype))


@each_grid
@each_scale_dtype
def test_odd_widths_and_every_scale_dtype_come_back(grid: str, bits: int, scale_dtype: str) -> None:
    for width, group_size in ((172, 43), (172, 4), (100, 25), (100, -1)):
        spec = QuantSpec.create(grid, bits, group_size=group_size, scale_dtype=scale_dtype)
        weight = normal(3, width)
        got = dequantize_packed(*packed(weight, spec), spec, width, torch.float32)
        assert torch.equal(got, fake_quantize(weight, spec)), (width, group_size)


@each_grid
@each_group_size
@pytest.mark.parametrize("tile", [1, 24, 5 * 24, 6 * 24 + 7, 13 * 24, 14 * 24])
def test_no_tile_size_changes_a_bit(
    grid: str, bits: int, group_size: int | str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 13 rows of 24: a tile smaller than one row, of one row, of a number of rows that leaves a rest, of all, of more
    monkeypatch.setattr(reference, "TILE_WEIGHTS", tile)
    spec = QuantSpec.create(grid, bits, group_size=group_size)
    weight = hard_weight()
    assert weight.shape == (13, 24)
    got = dequantize_packed(*packed(weight, spec), spec, 24, torch.float32)
    assert torch.equal(got, fake_quantize(weight, spec))


def test_a_row_wider_than_the_real_tile_comes_back() -> None:
    width = reference.TILE_WEIGHTS + 32
    spec = QuantSpec.create("int", 2, group_size=32)
    weight = normal(2, width)
    got = dequantize_packed(*packed(weight, spec), spec, width, torch.float32)
    assert torch.equal(got, fake_quantize(weight, spec))


def test_unpacking_never_holds_more_codes_than_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "TILE_WEIGHTS", 5 * 24)
    rows: list[int] = []

    def unpack(words: Tensor, *layout: Any) -> Tensor:
        rows.append(words.shape[0])
        return unpack_row(words, *layout)

    unpack_row = reference.unpack_row
    monkeypatch.setattr(reference, "unpack_row", unpack)
    spec = QuantSpec.create("nf", 3, group_size=-1)
    dequantize_packed(*packed(hard_weight(), spec), spec, 24, torch.float32)
    assert rows == [5, 5, 3]


@each_grid
@each_group_size
def test_a_stack_of_packed_matrices_comes_back(grid: str, bits: int, group_size: int | str) -> None:
    spec = QuantSpec.create(grid, bits, group_size=group_size)
    weight = normal(3, 5, 12)
    got = dequantize_packed(*packed(weight, spec), spec, 12, torch.bfloat16)
    assert torch.equal(got, fake_quantize(weight, spec).bfloat16())


@each_grid
@each_dtype
@pytest.mark.parametrize("with_bias", [False, True])
def test_multiplying_is_linear_on_the_dequantized_weight(
    grid: str, bits: int, dtype: torch.dtype, with_bias: bool
) -> None:
    spec = QuantSpec.create(grid, bits, group_size=8)
    weight, inputs = hard_weight(), normal(2, 5, 24, seed=1).to(dtype)
    bias = normal(13, seed=2).to(dtype) if with_bias else None
    got = packed_linear(inputs, *packed(weight, spec), spec, bias)
    assert got.dtype == dtype
    assert torch.equal(got, F.linear(inputs, fake_quantize(weight, spec).to(dtype), bias))


@each_dtype
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_under_autocast_it_multiplies_in_its_dtype(dtype: torch.dtype, cast: torch.dtype) -> None:
    spec = QuantSpec.create("nf", 3, group_size=8)
    weight, inputs, bias = normal(13, 24), normal(5, 24, seed=1).to(dtype), normal(13, seed=2)
    with autocast(cast):
        got = packed_linear(inputs, *packed(weight, spec), spec, bias)
        assert compute_dtype(inputs) == cast
    assert got.dtype == cast
    assert torch.equal(got, F.linear(inputs.to(cast), fake_quantize(weight, spec).to(cast), bias.to(cast)))


def test_the_compute_dtype_is_the_inputs_own_where_no_autocast_is() -> None:
    assert compute_dtype(torch.ones(1, dtype=torch.float16)) == torch.float16
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert compute_dtype(torch.ones(1)) == torch.float32
    assert compute_dtype(torch.ones(1, device="meta", dtype=torch.bfloat16)) == torch.bfloat16


@each_grid
@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=["plain", "autocast"])
def test_gradients_reach_inputs_and_bias_as_through_linear(grid: str, bits: int, cast: torch.dtype | None) -> None:
    spec = QuantSpec.create(grid, bits, group_size=8)
    weight = normal(13, 24)
    sides = []
    for multiply in (
        lambda inputs, bias: packed_linear(inputs, *packed(weight, spec), spec, bias),
        lambda inputs, bias: F.linear(inputs, fake_quantize(weight, spec), bias),
    ):
        inputs, bias = normal(5, 24, seed=1).requires_grad_(), normal(13, seed=2).requires_grad_()
        with autocast(cast):
            multiply(inputs, bias).float().square().sum().backward()
        sides.append((inputs.grad, bias.grad))
    (ours, our_bias), (theirs, their_bias) = sides
    assert torch.equal(ours, theirs)
    assert torch.equal(our_bias, their_bias)
    assert bool(ours.any())


def test_shapes_are_known_without_values() -> None:
    spec = QuantSpec.create("int", 2, group_size=8)
    words, params = packed(normal(13, 24), spec)
    meta = QuantParams(*(None if tensor is None else tensor.to("meta") for tensor in params))
    inputs = torch.empty(2, 5, 24, device="meta", dtype=torch.bfloat16)
    got = packed_linear(inputs, words.to("meta"), meta, spec)
    assert (got.shape, got.dtype) == ((2, 5, 13), torch.bfloat16)
