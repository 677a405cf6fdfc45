"""Ternary weights are BitNet's: the mean magnitude as scale, the nearest of three levels, the published gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

from bitdistiller_peft.grids import get_grid
from bitdistiller_peft.quantizers import QuantSpec, dequantize, fake_quantize, find_params, get_quantizer, quantize
from tests.quantizers.samples import assert_matches_reference, each_scale_dtype, hard_weight, matrices, normal

SPEC = QuantSpec.create("ternary", 2, group_size="tensor", scale_dtype="float32")


def published(weight: Tensor) -> Tensor:
    """BitNet Distillation, equations 1 and 2, in fp64 and without the small number in the divisor."""
    scale = weight.double().abs().mean()
    return scale * (weight.double() / scale).round().clamp(-1, 1)


def test_a_whole_matrix_is_quantized_as_published() -> None:
    weight = normal(48, 64, std=0.02)
    torch.testing.assert_close(fake_quantize(weight, SPEC).double(), published(weight), rtol=1e-6, atol=0)


@each_scale_dtype
@pytest.mark.parametrize("group_size", [-1, 4, 6, "tensor"])
def test_every_kind_of_group_is_as_the_reference_says(scale_dtype: str, group_size: int | str) -> None:
    spec = QuantSpec.create("ternary", 2, group_size=group_size, scale_dtype=scale_dtype)
    assert_matches_reference(hard_weight(), spec)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_the_usual_groups_are_as_the_reference_says(group_size: int) -> None:
    assert_matches_reference(normal(2, 256), QuantSpec.create("ternary", 2, group_size=group_size))


@given(weight=matrices)
def test_any_weight_is_as_the_reference_says(weight: Tensor) -> None:
    assert_matches_reference(weight, QuantSpec.create("ternary", 2, group_size=4))


def test_a_tie_goes_to_zero_on_both_sides() -> None:
    weight = torch.tensor([[0.5, -0.5, 1.0, -1.0, 1.5, -1.5, 1.0, 1.0]])  # the mean magnitude is 1
    assert find_params(weight, SPEC).scale.item() == 1.0
    assert fake_quantize(weight, SPEC).tolist() == [[0.0, 0.0, 1.0, -1.0, 1.0, -1.0, 1.0, 1.0]]


def test_codes_are_0_1_and_2_and_an_all_zero_group_has_scale_one() -> None:
    weight = torch.tensor([[-3.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    spec = QuantSpec.create("ternary", 2, group_size=-1)
    params = find_params(weight, spec)
    assert params.scale.tolist() == [[1.5], [1.0]]
    assert quantize(weight, params, spec).tolist() == [[0, 1, 2, 1], [1, 1, 1, 1]]
    assert not bool(torch.signbit(dequantize(quantize(weight, params, spec), params, spec)[1]).any())
    grid = get_grid("ternary", 2)
    assert (grid.num_levels, grid.fixed_zero_point, grid.has_zero_point) == (3, 1, False)


def test_the_share_of_zeros_and_the_error_on_gaussian_weights_are_the_known_ones() -> None:
    weight = normal(1024, 1024)
    values = fake_quantize(weight, SPEC)
    assert float((values == 0).float().mean()) == pytest.approx(0.31, abs=0.005)
    assert float((values - weight).square().mean() / weight.square().mean()) == pytest.approx(0.263, rel=0.01)


def test_the_straight_through_gradient_is_the_identity_for_clamped_weights_too() -> None:
    spec = QuantSpec.create("ternary", 2, group_size=16, gradient="ste")
    weight, upstream = (normal(4, 32) * 10).requires_grad_(), normal(4, 32, seed=1)
    fake_quantize(weight, spec).backward(upstream)
    assert torch.equal(weight.grad, upstream)


def test_the_exact_gradient_points_along_the_weight_as_the_values_do() -> None:
    # the values grow with the weights: f(t w) = t f(w), hence the derivative along w is f(w) (Euler)
    spec = QuantSpec.create("ternary", 2, group_size=16, scale_dtype="float32")
    weight, upstream = normal(4, 32).requires_grad_(), normal(4, 32, seed=1)
    values = fake_quantize(weight, spec)
    values.backward(upstream)
    torch.testing.assert_close((weight.grad * weight).sum(), (upstream * values).sum())


def test_a_range_is_met_by_the_outer_levels() -> None:
    low, high = torch.tensor([[-2.0, -0.5, 0.0]]), torch.tensor([[1.0, 0.75, 0.0]])
    params = get_quantizer(SPEC.grid).params_from_range(low, high, SPEC)
    assert params.scale.tolist() == [[2.0, 0.75, 1.0]]


def test_a_search_starts_at_the_mean_and_goes_outwards() -> None:
    groups = torch.tensor([[[1.0, -2.0, 0.0, 5.0]]])
    space = get_quantizer(SPEC.grid).search_space(groups, (1.0, 0.8, 0.5))
    assert (space.low.item(), space.high.item(), space.factors) == (-2.0, 2.0, (1.0, 1.25, 2.0))
