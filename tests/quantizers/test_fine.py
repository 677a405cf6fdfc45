"""Zero points in quarter steps: where they lie, what they cannot reach, and that they err less at the same size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitdistiller_peft.calibration.clip import search_range
from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.grids import FineGrid, get_grid
from bitdistiller_peft.layers.companions import packed_bytes
from bitdistiller_peft.quantizers import QuantSpec, fake_quantize, find_params, store_learned_params, zero_of
from tests.quantizers.samples import assert_matches_reference, hard_weight, normal

each_width = pytest.mark.parametrize("bits", [2, 3, 4, 8])


def spec_of(bits: int, **changes: object) -> QuantSpec:
    return QuantSpec.create("int_fine", bits, **{"group_size": 16, "scale_dtype": "float32", **changes})


@each_width
def test_zero_points_lie_in_quarters_about_the_middle(bits: int) -> None:
    grid = get_grid("int_fine", bits)
    zeros = zero_of(torch.arange(grid.num_levels), grid).tolist()
    top = 2**bits - 1
    assert zeros == [3 * top / 8 + code / 4 for code in range(top + 1)]
    assert [top - zero for zero in reversed(zeros)] == zeros, "both signs alike"
    if bits == 2:
        assert zeros == [1.125, 1.375, 1.625, 1.875]


@each_width
def test_a_weight_keeps_within_its_step(bits: int) -> None:
    weight, spec = normal(32, 64), spec_of(bits)
    params = find_params(weight, spec)
    error = (fake_quantize(weight, spec) - weight).abs().view(32, -1, 16).amax(-1) / params.scale
    # half a step, and what the ends lose where the zero point is rounded
    assert error.max() <= 0.5 + 0.125 + 1e-5


@pytest.mark.parametrize("sign", [1.0, -1.0])
@each_width
def test_a_group_of_one_sign_still_fits(bits: int, sign: float) -> None:
    weight, spec = sign * (normal(8, 64).abs() + 0.01), spec_of(bits)
    params = find_params(weight, spec)
    assert set(params.zero_point.flatten().tolist()) == ({0} if sign > 0 else {2**bits - 1})
    error = (fake_quantize(weight, spec) - weight).abs().view(8, -1, 16).amax(-1) / params.scale
    assert error.max() <= 0.5 + 1e-5


@each_width
def test_both_signs_are_treated_alike(bits: int) -> None:
    weight, spec = normal(16, 64), spec_of(bits)
    assert torch.equal(fake_quantize(-weight, spec), -fake_quantize(weight, spec))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@each_width
def test_a_group_of_zeros_becomes_next_to_nothing(bits: int, dtype: str) -> None:
    values = fake_quantize(torch.zeros(2, 32), spec_of(bits, scale_dtype=dtype))
    assert 0 < values.abs().max() < 2**-14


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("group_size", [-1, 4, "tensor"])
@each_width
def test_hard_weights_are_the_references(bits: int, group_size: int | str, dtype: str) -> None:
    assert_matches_reference(hard_weight(), spec_of(bits, group_size=group_size, scale_dtype=dtype))


def heavy_tailed(*shape: int) -> Tensor:
    """Student's t with 5 degrees of freedom, by its definition."""
    return normal(*shape, seed=3) / normal(5, *shape, seed=4).square().mean(0).sqrt()


KINDS = [(2, normal, 0.9), (3, normal, 0.95), (4, normal, 0.95), (2, heavy_tailed, 1.0)]


@pytest.mark.parametrize(("bits", "kind", "share"), KINDS)
def test_a_clip_search_errs_less_than_on_integers(bits: int, kind: Callable[..., Tensor], share: float) -> None:
    weight = kind(96, 256)
    inputs = normal(512, 256, seed=1).view(512, -1, 64).transpose(0, 1)
    gram = inputs.transpose(1, 2) @ inputs
    errors = {}
    for grid in ("int", "int_fine"):
        spec = QuantSpec.create(grid, bits, group_size=64)
        errors[grid] = float(search_range(weight, gram, spec).error_after.sum())
        assert packed_bytes(spec, weight.shape) == packed_bytes(QuantSpec.create("int", bits, group_size=64), (96, 256))
    assert errors["int_fine"] < share * errors["int"]


def test_a_learned_zero_point_is_rounded_to_a_quarter_step() -> None:
    spec = spec_of(2)
    weight = normal(4, 32)
    params = find_params(weight, spec)
    learned = params._replace(scale=params.scale.float(), zero_point=torch.full_like(params.scale, 1.4))
    stored = store_learned_params(learned, spec)
    assert set(stored.zero_point.flatten().tolist()) == {1}
    values = fake_quantize(weight, spec, scale=learned.scale, zero_point=learned.zero_point)
    steps = values / params.scale.repeat_interleave(16, -1)
    assert set(steps.round(decimals=3).flatten().tolist()) <= {-1.375, -0.375, 0.625, 1.625}


def test_bounds_of_integer_zero_points_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`zero_point_range` must be None for a grid without integer zero points"):
        spec_of(2, zero_point_range=(1, 2))
    assert isinstance(spec_of(2).grid, FineGrid)
