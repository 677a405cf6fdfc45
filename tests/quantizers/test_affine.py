"""The even grids give the codes, parameters and values of a scalar reference bit for bit, and keep half a step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitdistiller_peft.errors import ScaleRangeError
from bitdistiller_peft.grids import get_grid
from bitdistiller_peft.quantizers import (
    QuantSpec,
    dequantize,
    fake_quantize,
    find_params,
    get_quantizer,
    quantize,
)
from bitdistiller_peft.quantizers.affine import AffineQuantizer
from tests.quantizers.samples import (
    FP3,
    SCALE_DTYPES,
    assert_matches_reference,
    each_scale_dtype,
    hard_weight,
    matrices,
    normal,
    steps,
    ties,
)

WIDTHS = (2, 3, 4, 8)
each_kind = pytest.mark.parametrize("grid", ["int", "int_sym"])
each_width = pytest.mark.parametrize("bits", WIDTHS)
each_group_size = pytest.mark.parametrize("group_size", [-1, 6, "tensor"])

affine_specs = st.builds(
    lambda grid, bits, size, dtype: QuantSpec.create(grid, bits, group_size=size, scale_dtype=dtype),
    st.sampled_from(["int", "int_sym"]),
    st.sampled_from(WIDTHS),
    st.sampled_from([-1, 1, 4, 6, 12, "tensor"]),
    st.sampled_from(SCALE_DTYPES),
)
bounds = st.integers(2, 4).flatmap(
    lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), min_size=2, max_size=2).map(sorted))
)


def int_spec(bits: int, **options: object) -> QuantSpec:
    return QuantSpec.create("int", bits, group_size=-1, **options)


@each_kind
@each_width
@each_scale_dtype
@each_group_size
def test_every_kind_of_group_is_as_the_reference_says(
    grid: str, bits: int, scale_dtype: str, group_size: int | str
) -> None:
    assert_matches_reference(
        hard_weight(), QuantSpec.create(grid, bits, group_size=group_size, scale_dtype=scale_dtype)
    )


@each_kind
@each_width
@each_scale_dtype
def test_every_tie_and_its_neighbours_are_as_the_reference_says(grid: str, bits: int, scale_dtype: str) -> None:
    spec = QuantSpec.create(grid, bits, group_size=-1, scale_dtype=scale_dtype)
    weight = ties(spec)
    assert find_params(weight, spec).scale.item() == 0.25
    assert_matches_reference(weight, spec)


@each_kind
@pytest.mark.parametrize(("width", "group_size"), [(172, 43), (172, 4), (172, -1), (100, 25), (100, 20), (100, 100)])
def test_odd_widths_are_as_the_reference_says(grid: str, width: int, group_size: int) -> None:
    assert_matches_reference(normal(3, width), QuantSpec.create(grid, 2, group_size=group_size))


@pytest.mark.parametrize(
    ("scale_dtype", "size"),
    [
        ("float16", 9e4),
        ("float16", 0.02),
        ("bfloat16", 1e38),
        ("bfloat16", 1e-34),
        ("float32", 1e38),
        ("float32", 1e-34),
    ],
)
@each_kind
def test_huge_and_small_groups_are_as_the_reference_says(grid: str, scale_dtype: str, size: float) -> None:
    weight = normal(2, 64).clamp(-1, 1) * size
    assert_matches_reference(weight, QuantSpec.create(grid, 4, group_size=-1, scale_dtype=scale_dtype))


@given(weight=matrices, spec=affine_specs)
def test_any_weight_is_as_the_reference_says(weight: Tensor, spec: QuantSpec) -> None:
    assert_matches_reference(weight, spec)


@given(weight=matrices, bits_and_range=bounds, scale_dtype=st.sampled_from(SCALE_DTYPES))
def test_any_zero_point_range_is_as_the_reference_says(
    weight: Tensor, bits_and_range: tuple[int, list[int]], scale_dtype: str
) -> None:
    bits, zero_point_range = bits_and_range
    spec = int_spec(bits, zero_point_range=zero_point_range, scale_dtype=scale_dtype)
    assert_matches_reference(weight, spec)


@given(weight=matrices, spec=affine_specs)
def test_no_weight_moves_more_than_half_a_step(weight: Tensor, spec: QuantSpec) -> None:
    step = steps(find_params(weight, spec), weight, spec)
    moved = (fake_quantize(weight, spec).double() - weight.double()).abs()
    # fp32 adds: a rounding of the quotient, which can tip a tie, and one of the product
    allowed = step / 2 * (1 + 2**-22) + weight.double().abs() * 2**-23 + step * 2**-15
    assert bool((moved <= allowed).all()), f"moved {moved / step} steps"


@given(weight=matrices, bits_and_range=bounds)
def test_a_bounded_zero_point_still_covers_each_side_that_has_codes(
    weight: Tensor, bits_and_range: tuple[int, list[int]]
) -> None:
    bits, (low, high) = bits_and_range
    spec = int_spec(bits, zero_point_range=(low, high))
    params = find_params(weight, spec)
    zero_point, scale = params.zero_point.double(), params.scale.double()
    assert bool(((zero_point >= low) & (zero_point <= high)).all())
    above, below = 2**bits - 1 - zero_point, zero_point
    fits_above = above * scale >= weight.amax(-1, keepdim=True).double() * (1 - 2**-23)
    fits_below = below * scale >= -weight.amin(-1, keepdim=True).double() * (1 - 2**-23)
    assert bool((fits_above | (above == 0)).all())
    assert bool((fits_below | (below == 0)).all())


def test_the_llama_cpp_range_puts_a_two_bit_grid_on_one_or_two_steps_below_zero() -> None:
    spec = int_spec(2, zero_point_range=(1, 2), scale_dtype="float32")
    # all positive: zero point 0 would be best, 1 is the nearest allowed, and two codes are left above it
    assert find_params(torch.tensor([[0.0, 3.0]]), spec)[:2] == (torch.tensor([[1.5]]), torch.tensor([[1]]))
    assert find_params(torch.tensor([[0.0, -3.0]]), spec)[:2] == (torch.tensor([[1.5]]), torch.tensor([[2]]))
    assert find_params(torch.tensor([[-1.0, 2.0]]), spec)[:2] == (torch.tensor([[1.0]]), torch.tensor([[1]]))


def test_ties_round_half_to_even_and_stay_in_range() -> None:
    # scale 1, zero point round(1.5) = 2; every entry is a tie, and the last code would be 4 without the clamp
    weight = torch.tensor([[-1.5, -0.5, 0.5, 1.5]])
    assert fake_quantize(weight, int_spec(2)).tolist() == [[-2.0, 0.0, 0.0, 1.0]]


@each_scale_dtype
@pytest.mark.parametrize("value", [0.3, -0.3, 7.0, -7.0])
@each_width
def test_a_constant_group_is_kept(value: float, scale_dtype: str, bits: int) -> None:
    weight = torch.full((2, 8), value)
    got = fake_quantize(weight, int_spec(bits, scale_dtype=scale_dtype))
    # rounding the scale up is all that can move it
    torch.testing.assert_close(got, weight, rtol=2**-7 if scale_dtype == "bfloat16" else 2**-10, atol=0)


@each_kind
def test_an_all_zero_group_has_scale_one_and_codes_at_its_zero_point(grid: str) -> None:
    spec = QuantSpec.create(grid, 3, group_size=-1)
    params = find_params(torch.zeros(1, 5), spec)
    assert params.scale.tolist() == [[1.0]]
    zero = 4 if params.zero_point is None else int(params.zero_point)
    assert zero == (4 if grid == "int_sym" else 0)
    assert quantize(torch.zeros(1, 5), params, spec).tolist() == [[zero] * 5]


def test_the_far_extreme_of_a_symmetric_grid_is_half_a_step_beyond_its_last_code() -> None:
    spec = QuantSpec.create("int_sym", 2, group_size=-1, scale_dtype="float32")
    weight = torch.tensor([[-1.5, 0.0, 1.5]])
    assert find_params(weight, spec).scale.item() == 1.0
    assert fake_quantize(weight, spec).tolist() == [[-2.0, 0.0, 1.0]]


def test_a_range_given_from_outside_is_clipped_to() -> None:
    spec = int_spec(2)
    low, high = torch.tensor([[-1.0]]), torch.tensor([[2.0]])
    params = get_quantizer(spec.grid).params_from_range(low, high, spec)
    weight = torch.tensor([[-9.0, -1.0, 0.4, 2.0, 9.0]])
    assert dequantize(quantize(weight, params, spec), params, spec).tolist() == [[-1.0, -1.0, 0.0, 2.0, 2.0]]


def test_the_affine_quantizer_refuses_another_family() -> None:
    spec = QuantSpec(FP3, -1)
    with pytest.raises(TypeError, match="needs an AffineGrid"):
        AffineQuantizer().find_params(torch.ones(1, 1, 2), spec)


def test_an_asymmetric_grid_refuses_parameters_without_zero_points() -> None:
    spec = QuantSpec(get_grid("int", 2), -1)
    params = find_params(torch.ones(1, 4), spec)._replace(zero_point=None)
    with pytest.raises(TypeError, match="needs zero points"):
        quantize(torch.ones(1, 4), params, spec)


@pytest.mark.parametrize("options", [{"grid": "int_sym"}, {"grid": "int", "zero_point_range": (1, 2)}], ids=str)
def test_a_scale_whose_outermost_level_overflows_is_refused(options: dict[str, object]) -> None:
    spec = QuantSpec.create(bits=2, group_size=-1, scale_dtype="float32", **options)
    fits, too_large = torch.tensor([[1e38, -1.0, 0.0, 0.5]]), torch.tensor([[3.3e38, -1.0, 0.0, 0.5]])
    assert bool(fake_quantize(fits, spec).isfinite().all())
    with pytest.raises(ScaleRangeError, match="overflow"):  # the scale itself is a number
        find_params(too_large, spec)
