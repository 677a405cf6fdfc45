"""The listed levels give a scalar reference's codes, scales and values bit for bit, and the nearest level always."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitdistiller_peft.errors import ScaleRangeError
from bitdistiller_peft.grids import CodebookGrid, get_grid
from bitdistiller_peft.quantizers import QuantSpec, dequantize, fake_quantize, find_params, quantize
from bitdistiller_peft.quantizers.codebook import CodebookQuantizer
from tests.quantizers.samples import (
    FP3,
    GRIDS,
    LOPSIDED,
    SCALE_DTYPES,
    assert_matches_reference,
    each_scale_dtype,
    hard_weight,
    matrices,
    normal,
    steps,
    ties,
    widest_gap,
)

CODEBOOKS = [get_grid(name, bits) for name, bits in GRIDS if name.startswith(("nf", "fp"))] + [FP3, LOPSIDED]
each_codebook = pytest.mark.parametrize("grid", CODEBOOKS, ids=lambda grid: f"{grid.name}-{grid.bits}")
each_group_size = pytest.mark.parametrize("group_size", [-1, 6, "tensor"])

codebook_specs = st.builds(
    lambda grid, size, dtype: QuantSpec(grid, size, QuantSpec.create("nf", 2, scale_dtype=dtype).scale_dtype),
    st.sampled_from(CODEBOOKS),
    st.sampled_from([-1, 1, 4, 6, 12, "tensor"]),
    st.sampled_from(SCALE_DTYPES),
)


def midpoints_in_fp32(spec: QuantSpec) -> Tensor:
    """At scale 1; most are not half-way any more, which a comparison in fp64 would see."""
    return torch.tensor([[spec.grid.levels[0], spec.grid.levels[-1], *spec.grid.midpoints]])


MANY = CodebookGrid("thirds", 6, levels=tuple(float(torch.tensor(k / 3)) for k in range(-31, 32)))


@pytest.mark.parametrize("grid", [*CODEBOOKS, MANY], ids=lambda grid: f"{grid.name}-{grid.bits}")
@pytest.mark.parametrize("make", [lambda spec: hard_weight(), midpoints_in_fp32], ids=["hard", "midpoints"])
def test_torchs_default_dtype_changes_nothing(grid: object, make: Callable[[QuantSpec], Tensor]) -> None:
    spec = QuantSpec(grid, -1, torch.float16)
    weight = make(spec)
    params = find_params(weight, spec)
    expected = (quantize(weight, params, spec), fake_quantize(weight, spec))
    torch.set_default_dtype(torch.float64)
    try:
        again = find_params(weight, spec)
        found = (quantize(weight, again, spec), fake_quantize(weight, spec))
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.scale.equal(params.scale)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.equal(other)


@each_codebook
@each_scale_dtype
@each_group_size
def test_every_kind_of_group_is_as_the_reference_says(grid: object, scale_dtype: str, group_size: int | str) -> None:
    assert_matches_reference(hard_weight(), QuantSpec(grid, group_size, getattr(torch, scale_dtype)))


@each_codebook
@each_scale_dtype
def test_every_tie_and_its_neighbours_are_as_the_reference_says(grid: object, scale_dtype: str) -> None:
    spec = QuantSpec(grid, -1, getattr(torch, scale_dtype))
    weight = ties(spec)
    assert find_params(weight, spec).scale.item() == 0.25
    assert_matches_reference(weight, spec)


@each_codebook
@pytest.mark.parametrize(("width", "group_size"), [(172, 43), (172, -1), (100, 25)])
def test_odd_widths_are_as_the_reference_says(grid: object, width: int, group_size: int) -> None:
    assert_matches_reference(normal(2, width), QuantSpec(grid, group_size))


@pytest.mark.parametrize(
    ("scale_dtype", "size"),
    [
        ("float16", 6e4),
        ("float16", 1e-3),
        ("bfloat16", 1e38),
        ("bfloat16", 1e-34),
        ("float32", 1e38),
        ("float32", 1e-34),
    ],
)
@pytest.mark.parametrize("name", ["nf", "nf_sym", "fp", "fp_sym"])
def test_huge_and_small_groups_are_as_the_reference_says(name: str, scale_dtype: str, size: float) -> None:
    weight = normal(2, 64).clamp(-1, 1) * size
    assert_matches_reference(weight, QuantSpec.create(name, 4, group_size=-1, scale_dtype=scale_dtype))


@given(weight=matrices, spec=codebook_specs)
def test_any_weight_is_as_the_reference_says(weight: Tensor, spec: QuantSpec) -> None:
    assert_matches_reference(weight, spec)


@given(weight=matrices, spec=codebook_specs)
def test_every_weight_goes_to_the_nearest_level(weight: Tensor, spec: QuantSpec) -> None:
    codes = quantize(weight, find_params(weight, spec), spec)
    step = steps(find_params(weight, spec), weight, spec)
    levels = [Fraction(level) for level in spec.grid.levels]
    for value, scale, code in zip(
        weight.double().flatten().tolist(), step.flatten().tolist(), codes.flatten().tolist(), strict=True
    ):
        x = Fraction(value) / Fraction(scale) if scale else Fraction(0)
        distances = [abs(x - level) for level in levels]
        # the quotient and the midpoint are rounded to fp32, each by half a unit of their last place
        assert distances[code] <= min(distances) + 2**-21, (value, scale, code)


@given(weight=matrices, spec=codebook_specs)
def test_no_weight_moves_more_than_half_the_widest_gap(weight: Tensor, spec: QuantSpec) -> None:
    step = steps(find_params(weight, spec), weight, spec)
    moved = (fake_quantize(weight, spec).double() - weight.double()).abs()
    assert bool((moved <= step * widest_gap(spec) / 2 + step * 2**-20).all()), f"moved {moved / step} scales"


@each_codebook
@pytest.mark.parametrize("value", [0.3, -0.3])
def test_a_constant_group_is_kept(grid: object, value: float) -> None:
    weight = torch.full((2, 8), value)
    torch.testing.assert_close(fake_quantize(weight, QuantSpec(grid, -1)), weight, rtol=2**-10, atol=0)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_group_of_one_sign_stores_no_scale_for_the_other_and_never_divides_by_it(sign: float) -> None:
    spec = QuantSpec.create("nf", 3, group_size=-1)
    weight = sign * torch.tensor([[0.0, 1.0, 2.0, 4.0]])
    params = find_params(weight, spec)
    present, absent = (params.scale, params.scale_negative)[:: int(sign)]
    assert present.item() == 4.0
    assert absent.item() == 0.0
    got = fake_quantize(weight, spec)
    assert got.isfinite().all()
    assert got[0, 0] == 0
    assert got[0, -1] == 4 * sign


def test_each_sign_has_its_own_scale_unless_the_grid_is_symmetric() -> None:
    weight = torch.tensor([[-2.0, 0.5]])
    two = find_params(weight, QuantSpec.create("nf", 4, group_size=-1))
    assert (two.scale.item(), two.scale_negative.item()) == (0.5, 2.0)
    one = find_params(weight, QuantSpec.create("nf_sym", 4, group_size=-1))
    assert (one.scale.item(), one.scale_negative) == (2.0, None)


def test_half_way_between_two_levels_is_the_lower_one() -> None:
    spec = QuantSpec(FP3, -1)
    weight = torch.tensor([[-4.0, -3.0, -1.5, -0.5, 0.5, 1.5, 3.0, 4.0]])
    assert fake_quantize(weight, spec).tolist() == [[-4.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0]]


def test_a_symmetric_codebook_fits_on_both_sides_although_its_ends_differ() -> None:
    spec = QuantSpec(LOPSIDED, -1, torch.float32)
    assert find_params(torch.tensor([[-1.0, 3.0]]), spec).scale.item() == 2.0  # the negative end is at -0.5
    assert find_params(torch.tensor([[-1.0, 9.0]]), spec).scale.item() == 3.0


@each_codebook
def test_an_all_zero_group_has_scale_one_and_codes_at_the_zero_level(grid: object) -> None:
    spec = QuantSpec(grid, -1)
    params = find_params(torch.zeros(1, 5), spec)
    assert params.scale.tolist() == [[1.0]]
    codes = quantize(torch.zeros(1, 5), params, spec)
    assert codes.tolist() == [[grid.zero_code] * 5]
    assert dequantize(codes, params, spec).tolist() == [[0.0] * 5]


def test_no_value_is_negative_zero() -> None:
    for grid in CODEBOOKS:
        values = fake_quantize(hard_weight(), QuantSpec(grid, -1))
        assert not bool(torch.signbit(values[values == 0]).any()), grid.name


def test_the_codebook_quantizer_refuses_another_family() -> None:
    spec = QuantSpec(get_grid("int", 2), -1)
    with pytest.raises(TypeError, match="needs a CodebookGrid"):
        CodebookQuantizer().find_params(torch.ones(1, 1, 2), spec)


@each_codebook
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("scale_dtype", "size"), [("float32", 1.4e-45), ("bfloat16", 3.3895e38)])
def test_a_weight_at_the_end_of_fp32_is_refused_or_met(grid: object, sign: int, scale_dtype: str, size: float) -> None:
    spec = QuantSpec(grid, -1, getattr(torch, scale_dtype))
    weight = torch.full((1, 12), sign * size)
    try:
        values = fake_quantize(weight, spec)
        find_params(weight, spec)
    except ScaleRangeError:
        return
    assert bool(values.isfinite().all())
    torch.testing.assert_close(values, weight, rtol=0.02, atol=0)


@pytest.mark.parametrize("levels", [(-3.0, -1.0, 0.0, 0.25, 0.5), (-0.5, -0.25, 0.0, 1.0, 3.0)], ids=["low", "high"])
def test_of_two_ends_the_farther_one_must_be_a_number(levels: tuple[float, ...]) -> None:
    spec = QuantSpec(CodebookGrid("one-sided", 3, levels=levels, is_symmetric=True), -1, torch.float32)
    short = 0.5 if levels[-1] == 0.5 else -0.5
    assert bool(fake_quantize(torch.tensor([[short * 1e38, 0.0]]), spec).isfinite().all())
    with pytest.raises(ScaleRangeError, match="overflow"):  # the far end lies at 3 * 3e38
        find_params(torch.tensor([[short * 3e38, 0.0]]), spec)
