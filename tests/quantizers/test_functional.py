"""What is trained is what is packed, on every grid; zero, order and repetition keep it so; bad weights are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitdistiller_peft.errors import GroupSizeError, ScaleRangeError, WeightError
from bitdistiller_peft.grids import CodebookGrid
from bitdistiller_peft.quantizers import (
    QuantParams,
    QuantSpec,
    dequantize,
    fake_quantize,
    find_params,
    quantize,
    store_learned_params,
)
from tests.quantizers.samples import (
    WIDTHS,
    assert_matches_reference,
    each_grid,
    each_scale_dtype,
    hard_weight,
    matrices,
    normal,
    specs,
    steps,
)

WITHOUT_ZERO = ("r2q", "int_fine")  # no level of these is zero
each_group_size = pytest.mark.parametrize("group_size", [-1, 6, 8, "tensor"])


def round_trip(weight: Tensor, spec: QuantSpec) -> Tensor:
    params = find_params(weight, spec)
    return dequantize(quantize(weight, params, spec), params, spec)


def learned_from(params: QuantParams) -> dict[str, Tensor | None]:
    """Parameters as training keeps them: fp32, zero points too."""
    return {name: None if tensor is None else tensor.float() for name, tensor in params._asdict().items()}


@each_grid
@each_scale_dtype
@each_group_size
def test_training_sees_exactly_what_is_packed(grid: str, bits: int, scale_dtype: str, group_size: int | str) -> None:
    spec = QuantSpec.create(grid, bits, group_size=group_size, scale_dtype=scale_dtype)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = hard_weight().to(dtype)
        assert torch.equal(fake_quantize(weight, spec), round_trip(weight, spec)), dtype


@each_grid
@each_scale_dtype
def test_training_with_learned_parameters_sees_exactly_what_is_packed(grid: str, bits: int, scale_dtype: str) -> None:
    spec = QuantSpec.create(grid, bits, group_size=8, scale_dtype=scale_dtype)
    weight, other = hard_weight(), hard_weight().roll(3, 0) * 0.9
    learned = learned_from(find_params(other, spec))  # parameters of another weight: much is clamped
    learned["scale"] = learned["scale"] * 1.01  # and no longer a number of the storage dtype
    if learned["zero_point"] is not None:
        learned["zero_point"] = learned["zero_point"] + 0.3
    params = store_learned_params(QuantParams(**learned), spec)
    codes = quantize(weight, params, spec)
    assert torch.equal(fake_quantize(weight, spec, **learned), dequantize(codes, params, spec))


@given(weight=matrices, spec=specs)
def test_any_weight_is_trained_as_it_is_packed(weight: Tensor, spec: QuantSpec) -> None:
    assert torch.equal(fake_quantize(weight, spec), round_trip(weight, spec))


@given(weight=matrices, spec=specs)
def test_codes_are_in_range(weight: Tensor, spec: QuantSpec) -> None:
    codes = quantize(weight, find_params(weight, spec), spec)
    assert codes.dtype == torch.uint8
    assert codes.shape == weight.shape
    assert codes.int().max() < spec.grid.num_levels


@given(weight=matrices, other=matrices, spec=specs)
def test_codes_are_in_range_under_parameters_of_another_weight(weight: Tensor, other: Tensor, spec: QuantSpec) -> None:
    rows = min(len(weight), len(other))
    params = store_learned_params(QuantParams(**learned_from(find_params(other[:rows], spec))), spec)
    assert quantize(weight[:rows] * 1e6, params, spec).int().max() < spec.grid.num_levels


@given(weight=matrices, spec=specs)
def test_quantizing_the_quantized_gives_the_same_codes(weight: Tensor, spec: QuantSpec) -> None:
    params = find_params(weight, spec)
    codes = quantize(weight, params, spec)
    again = quantize(dequantize(codes, params, spec), params, spec)
    assert torch.equal(dequantize(again, params, spec), dequantize(codes, params, spec))
    assert spec.grid.name == "r2q" or torch.equal(again, codes)  # where a scale of it is 0, two codes mean the same


@given(weight=matrices, spec=specs.filter(lambda spec: spec.grid.name not in WITHOUT_ZERO))
def test_zero_stays_zero(weight: Tensor, spec: QuantSpec) -> None:
    values = fake_quantize(weight, spec)[weight == 0]
    assert not bool(values.any())
    assert not bool(torch.signbit(values).any())


@given(weight=matrices, spec=specs)
def test_no_weight_changes_its_sign(weight: Tensor, spec: QuantSpec) -> None:
    values, around = fake_quantize(weight, spec), 0.0
    if spec.grid.name == "int_fine":  # zero lies between two levels: a weight within half a step may cross it
        around = steps(find_params(weight, spec), weight, spec) / 2
    assert bool(((values * weight >= 0) | (weight.abs() <= around)).all())


@given(weight=matrices, spec=specs, seed=st.integers(0, 99))
def test_rows_may_be_shuffled(weight: Tensor, spec: QuantSpec, seed: int) -> None:
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(fake_quantize(weight[order], spec), fake_quantize(weight, spec)[order])


@given(weight=matrices, bits=st.sampled_from([2, 3, 4]), exponent=st.integers(-3, 3))
def test_a_power_of_two_passes_through(weight: Tensor, bits: int, exponent: int) -> None:
    for grid in (name for name, widths in WIDTHS.items() if bits in widths):
        spec = QuantSpec.create(grid, bits, group_size=6, scale_dtype="float32")
        moved, values = fake_quantize(weight * 2.0**exponent, spec), fake_quantize(weight, spec)
        if grid == "int_fine":  # its groups of zeros have a scale of their own
            moved, values = (each.view(-1, 6)[weight.view(-1, 6).any(1)] for each in (moved, values))
        assert torch.equal(moved, values * 2.0**exponent)


@each_grid
def test_a_larger_weight_never_gets_a_smaller_value(grid: str, bits: int) -> None:
    weight = normal(4, 64).sort(-1).values
    values = fake_quantize(weight, QuantSpec.create(grid, bits, group_size=-1))
    assert bool((values.diff(dim=-1) >= 0).all())


@each_grid
@pytest.mark.parametrize("group_size", [-1, 4, "tensor"])
def test_a_stack_of_matrices_is_quantized_matrix_by_matrix(grid: str, bits: int, group_size: int | str) -> None:
    spec = QuantSpec.create(grid, bits, group_size=group_size)
    weight = normal(3, 5, 12) * torch.tensor([1.0, 0.3, 20.0])[:, None, None]
    params = find_params(weight, spec)
    codes = quantize(weight, params, spec)
    for index, matrix in enumerate(weight):
        alone = find_params(matrix, spec)
        assert all(
            (whole is None and one is None) or torch.equal(whole[index], one)
            for whole, one in zip(params, alone, strict=True)
        )
        assert torch.equal(codes[index], quantize(matrix, alone, spec))
        assert_matches_reference(matrix, spec)
    assert torch.equal(dequantize(codes, params, spec), fake_quantize(weight, spec))
    assert params.scale.shape == spec.param_shape(weight.shape)


@each_grid
def test_a_weight_that_is_not_contiguous_is_quantized_like_its_copy(grid: str, bits: int) -> None:
    spec = QuantSpec.create(grid, bits, group_size=4)
    weight = normal(12, 8).T
    assert torch.equal(fake_quantize(weight, spec), fake_quantize(weight.contiguous(), spec))
    codes = quantize(weight, find_params(weight, spec), spec)
    assert torch.equal(codes, quantize(weight.contiguous(), find_params(weight, spec), spec))


@each_grid
def test_nothing_is_written_into_the_weight_or_the_parameters(grid: str, bits: int) -> None:
    spec = QuantSpec.create(grid, bits, group_size=4, scale_dtype="float32")
    weight = normal(3, 8)
    kept = weight.clone()
    params = find_params(weight, spec)
    kept_params = [None if tensor is None else tensor.clone() for tensor in params]
    codes = quantize(weight, params, spec)
    kept_codes = codes.clone()
    dequantize(codes, params, spec)
    learned = weight.clone().requires_grad_()
    fake_quantize(learned, spec, **learned_from(params)).square().sum().backward()
    fake_quantize(learned, spec).square().sum().backward()
    assert torch.equal(weight, kept)
    assert torch.equal(learned.detach(), kept)
    assert torch.equal(codes, kept_codes)
    for tensor, before in zip(params, kept_params, strict=True):
        assert (tensor is None and before is None) or torch.equal(tensor, before)


def test_values_are_fp32_whatever_the_weight_is() -> None:
    spec = QuantSpec.create("int", 2, group_size=-1)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert fake_quantize(torch.ones(2, 4, dtype=dtype), spec).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------- learned


@each_scale_dtype
@pytest.mark.parametrize("scale", [-3.0, 0.0, 1e-30])
def test_a_learned_scale_below_the_smallest_is_stored_as_the_smallest(scale: float, scale_dtype: str) -> None:
    spec = QuantSpec.create("nf", 3, group_size=-1, scale_dtype=scale_dtype)
    learned = torch.tensor([[scale if scale <= 0 or scale_dtype == "float16" else 0.0]])
    params = store_learned_params(QuantParams(learned, scale_negative=learned), spec)
    tiny = torch.finfo(spec.scale_dtype).tiny
    assert params.scale.item() == params.scale_negative.item() == tiny
    assert params.scale.dtype == spec.scale_dtype
    values = fake_quantize(normal(1, 6), spec, scale=learned, scale_negative=learned)
    assert values.isfinite().all()


def test_a_learned_zero_point_is_stored_as_the_nearest_allowed_integer() -> None:
    learned = torch.tensor([[-2.0, 0.5, 1.5, 1.6, 9.0]])
    scale = torch.ones_like(learned)
    spec = QuantSpec.create("int", 2, group_size=1)
    stored = store_learned_params(QuantParams(scale, learned), spec).zero_point
    assert stored.tolist() == [[0, 0, 2, 2, 3]]
    assert stored.dtype == torch.uint8
    bounded = QuantSpec.create("int", 2, group_size=1, zero_point_range=(1, 2))
    assert store_learned_params(QuantParams(scale, learned), bounded).zero_point.tolist() == [[1, 1, 2, 2, 2]]


def test_a_zero_point_that_is_not_learned_is_taken_as_it_is() -> None:
    spec = QuantSpec.create("int", 2, group_size=-1)
    fixed = torch.tensor([[1]], dtype=torch.uint8)
    assert torch.equal(store_learned_params(QuantParams(torch.ones(1, 1), fixed), spec).zero_point, fixed)


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@each_grid
def test_a_weight_that_is_not_finite_is_refused(grid: str, bits: int, bad: float) -> None:
    spec = QuantSpec.create(grid, bits, group_size=4)
    weight = normal(2, 8)
    params = find_params(weight, spec)
    weight[1, 5] = bad
    with pytest.raises(WeightError, match="the weight must be finite: got NaN or Inf"):
        find_params(weight, spec)
    with pytest.raises(WeightError, match="the weight must be finite: got NaN or Inf"):
        quantize(weight, params, spec)


@pytest.mark.parametrize(
    ("size", "problem"), [(1e9, r"at most 6.55e\+04 .* float16"), (1e-7, r"at least 6.104e-05 .* float16")]
)
@each_grid
def test_a_scale_that_fp16_cannot_hold_is_refused_and_fp32_named(
    grid: str, bits: int, size: float, problem: str
) -> None:
    weight = torch.tensor([[-1.0, 0.25, 1.0, 0.5]]) * size
    with pytest.raises(ScaleRangeError, match=problem) as refusal:
        find_params(weight, QuantSpec.create(grid, bits, group_size=-1))
    assert 'Use scale_dtype="float32"' in str(refusal.value)
    spec = QuantSpec.create(grid, bits, group_size=-1, scale_dtype="float32")
    torch.testing.assert_close(fake_quantize(weight, spec), weight, rtol=0, atol=0.5 * size)


def test_one_bad_group_among_good_ones_is_enough_to_refuse() -> None:
    weight = normal(8, 8)
    weight[5, 4:] = 1e-7
    with pytest.raises(ScaleRangeError):
        find_params(weight, QuantSpec.create("int", 4, group_size=4))
    find_params(weight, QuantSpec.create("int", 4, group_size=8))  # beside larger weights they are just small


def test_a_weak_sign_is_refused_too() -> None:
    weight = torch.tensor([[1.0, -1e-6]])
    with pytest.raises(ScaleRangeError, match="at least"):
        find_params(weight, QuantSpec.create("nf", 3, group_size=-1))


def test_a_weight_of_integers_is_refused() -> None:
    spec = QuantSpec.create("int", 2, group_size=-1)
    weight = torch.ones(2, 4, dtype=torch.int8)
    params = find_params(weight.float(), spec)
    with pytest.raises(WeightError, match=r"floating point: got dtype=torch\.int8"):
        find_params(weight, spec)
    with pytest.raises(WeightError, match="floating point"):
        quantize(weight, params, spec)


def test_a_weight_without_values_is_refused() -> None:
    with pytest.raises(WeightError, match="meta"):
        find_params(torch.empty(2, 4, device="meta"), QuantSpec.create("int", 2, group_size=-1))


def test_a_group_size_that_does_not_divide_is_refused() -> None:
    with pytest.raises(GroupSizeError, match="group_size=48, in_features=100"):
        fake_quantize(normal(2, 100), QuantSpec.create("int", 2, group_size=48))


def test_a_grid_of_ones_own_needs_only_its_levels() -> None:
    spec = QuantSpec(CodebookGrid("mine", 2, levels=(-1.0, 0.0, 0.5)), -1)
    assert fake_quantize(torch.tensor([[-2.0, -0.9, 0.1, 0.5, 1.0]]), spec).tolist() == [[-2.0, 0.0, 0.0, 0.0, 1.0]]
