"""Two residual signs: closed-form scales as a scalar reference finds them, nearest levels, errors as were measured."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitdistiller_peft.errors import ConfigError, ScaleRangeError, WeightError
from bitdistiller_peft.quantizers import (
    QuantParams,
    QuantSpec,
    check_residual_scale,
    dequantize,
    fake_quantize,
    find_params,
    get_quantizer,
    quantize,
    store_learned_params,
)
from tests.quantizers.samples import (
    RESIDUAL_OPTIONS,
    SCALE_DTYPES,
    assert_matches_reference,
    each_scale_dtype,
    hard_weight,
    matrices,
    normal,
)

OPTIONS = [{}, *RESIDUAL_OPTIONS]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def create(options: dict[str, object], **kwargs: object) -> QuantSpec:
    return QuantSpec.create("r2q", 2, **{"group_size": -1, **kwargs, **options})


residual_specs = st.builds(
    lambda options, size, dtype: create(options, group_size=size, scale_dtype=dtype),
    st.sampled_from(OPTIONS),
    st.sampled_from([-1, 1, 4, 6, 12, "tensor"]),
    st.sampled_from(SCALE_DTYPES),
)


@each_option
@each_scale_dtype
@pytest.mark.parametrize("group_size", [-1, 6, "tensor"])
def test_every_kind_of_group_is_as_the_reference_says(
    options: dict[str, object], scale_dtype: str, group_size: int | str
) -> None:
    assert_matches_reference(hard_weight(), create(options, group_size=group_size, scale_dtype=scale_dtype))


@each_option
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_the_usual_groups_are_as_the_reference_says(options: dict[str, object], group_size: int) -> None:
    assert_matches_reference(normal(2, 256), create(options, group_size=group_size))


@given(weight=matrices, spec=residual_specs)
def test_any_weight_is_as_the_reference_says(weight: Tensor, spec: QuantSpec) -> None:
    assert_matches_reference(weight, spec)


@given(weight=matrices, spec=residual_specs)
def test_every_weight_goes_to_a_nearest_level(weight: Tensor, spec: QuantSpec) -> None:
    spec = QuantSpec(spec.grid, -1, spec.scale_dtype, refine=spec.refine)
    params = find_params(weight, spec)
    codes = quantize(weight, params, spec)
    for row, scales, chosen in zip(weight.tolist(), zip(*both(params), strict=True), codes.tolist(), strict=True):
        first, second = map(Fraction, scales)
        levels = [a * first + b * second for a in (-1, 1) for b in (-1, 1)]  # by code
        for value, code in zip(row, chosen, strict=True):
            distances = [abs(Fraction(value) - level) for level in levels]
            assert distances[code] == min(distances)


def both(params: QuantParams) -> tuple[list[float], list[float]]:
    scale = params.scale.double().squeeze(-1)
    residual = scale / 2 if params.scale_residual is None else params.scale_residual.double().squeeze(-1)
    return scale.tolist(), residual.tolist()


# ------------------------------------------------------------------------------------------------- known small cases


def test_scales_and_codes_of_a_small_group() -> None:
    weight = torch.tensor([[1.0, 2.0, -1.0, -4.0]])
    spec = create({})
    params = find_params(weight, spec)
    assert (params.scale.item(), params.scale_residual.item()) == (2.0, 1.0)  # mean |w|; mean of 1, 0, 1 and 2
    assert quantize(weight, params, spec).tolist() == [[2, 3, 1, 0]]  # half-way between 1 and 3 is 3
    assert fake_quantize(weight, spec).tolist() == [[1.0, 3.0, -1.0, -3.0]]


def test_least_squares_puts_both_levels_at_the_means_of_their_weights() -> None:
    weight = torch.tensor([[1.0, 2.0, -1.5, -4.0, 5.0, 0.0]])  # the mean magnitude is 2.25
    assert fake_quantize(weight, create({"refine": "least_squares"})).abs().tolist() == [
        [1.125, 1.125, 1.125, 4.5, 4.5, 1.125]
    ]


def test_a_group_of_a_few_large_weights_keeps_the_sign_of_the_small_ones() -> None:
    # the second scale is the larger one: taken in the greedy order, the small weights would turn negative
    weight = torch.tensor([[0.1, 0.1, -0.1, 4.0]])
    spec = create({}, scale_dtype="float32")
    params = find_params(weight, spec)
    assert params.scale_residual > params.scale
    values = fake_quantize(weight, spec)
    assert bool((values * weight > 0).all())
    torch.testing.assert_close(values[0, 3], (params.scale + params.scale_residual)[0, 0])


@each_option
@pytest.mark.parametrize("value", [0.3, -0.3])
def test_a_constant_group_is_kept_unless_the_levels_are_evenly_spaced(options: dict[str, object], value: float) -> None:
    weight = torch.full((2, 8), value)
    # greedy tied scales put the outer level, or with a negative tie the inner one, beside the constant
    tolerance = 0.51 if options.get("tied") and not options.get("refine") else 2**-8
    torch.testing.assert_close(fake_quantize(weight, create(options)), weight, rtol=tolerance, atol=0)


def test_an_all_zero_group_is_zero_and_almost_so_when_tied() -> None:
    weight = torch.zeros(1, 8)
    assert fake_quantize(weight, create({})).tolist() == weight.tolist()
    assert find_params(weight, create({})).scale.item() == 1.0
    tied = fake_quantize(weight, create({"tied": True}))
    assert bool((tied.abs() == torch.finfo(torch.float16).tiny / 2).all())


@each_scale_dtype
@pytest.mark.parametrize("refine", [None, "alternating"])
def test_a_tied_scale_leaves_room_for_the_offset_of_other_formats(scale_dtype: str, refine: str | None) -> None:
    spec = create({"tied": True, "refine": refine}, group_size=4, scale_dtype=scale_dtype)
    for params in (
        find_params(normal(16, 32), spec),
        store_learned_params(QuantParams(normal(16, 8).abs() + 0.01), spec),
    ):
        assert params.scale_residual is None
        offset = 1.5 * params.scale.double()
        assert torch.equal(offset.to(spec.scale_dtype).double(), offset)
        assert params.scale.dtype == spec.scale_dtype
    values = fake_quantize(normal(16, 32), spec).reshape(16, -1, 4).double()
    step = find_params(normal(16, 32), spec).scale.double().unsqueeze(-1)
    codes = (values + 1.5 * step) / step  # weight = step * code - 1.5 * step
    assert set(codes.flatten().tolist()) <= {0.0, 1.0, 2.0, 3.0}


# ------------------------------------------------------------------------------------------------------------- errors

# Relative squared error in groups of 128, measured with other code: the greedy scales, least squares on the greedy
# signs, and three alternations.
MEASURED = {
    "gauss": (0.1285, 0.1225, 0.1145),
    "laplace": (0.2242, 0.2025, 0.1697),
    "student": (0.2165, 0.2020, 0.1763),
}


@cache
def sample(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    gauss = torch.randn(512, 1024, generator=generator)
    if kind == "gauss":
        return gauss
    if kind == "laplace":
        u = torch.rand(512, 1024, generator=generator) - 0.5
        return -u.sign() * torch.log1p(-2 * u.abs())
    others = torch.randn(5, 512, 1024, generator=generator)
    return gauss / others.square().mean(0).sqrt()


def relative_error(values: Tensor, weight: Tensor) -> float:
    return float((values - weight).square().mean() / weight.square().mean())


@pytest.mark.parametrize("kind", MEASURED)
def test_errors_are_those_that_were_measured(kind: str) -> None:
    weight = sample(kind)
    greedy, least_squares, alternating = (
        relative_error(fake_quantize(weight, create({"refine": refine}, group_size=128)), weight)
        for refine in (None, "least_squares", "alternating")
    )
    rel = 0.01 if kind == "gauss" else 0.02  # heavy tails: half a million weights err by so much
    assert greedy == pytest.approx(MEASURED[kind][0], rel=rel)
    assert alternating == pytest.approx(MEASURED[kind][2], rel=rel)
    # ours also moves the weights to their nearest levels afterwards, hence lies between the two
    assert alternating < least_squares < MEASURED[kind][1]


@given(weight=matrices, size=st.sampled_from([-1, 4, 6, 12]), tied=st.booleans())
def test_refining_never_errs_more(weight: Tensor, size: int, tied: bool) -> None:
    errors = []
    for refine in (None, "least_squares", "alternating"):
        spec = create({"refine": refine, "tied": tied}, group_size=size, scale_dtype="float32")
        moved = fake_quantize(weight, spec).double() - weight.double()
        errors.append(moved.reshape(len(weight), -1, 12 if size == -1 else size).square().sum(-1))
    energy = weight.double().square().sum()
    # each scale is rounded to fp32, the tied one to two digits less
    assert bool((errors[1] <= errors[0] + 2**-18 * energy).all())
    assert bool((errors[2] <= errors[1] + 2**-18 * energy).all())


# ------------------------------------------------------------------------------------------------- learned, refused


def test_a_learned_residual_scale_may_be_zero_and_still_learns() -> None:
    spec = create({})
    scale, residual = torch.tensor([[0.25]]), torch.tensor([[-0.2]], requires_grad=True)
    assert store_learned_params(QuantParams(scale, scale_residual=residual), spec).scale_residual.item() == 0.0
    values = fake_quantize(torch.full((1, 4), 0.25), spec, scale=scale, scale_residual=residual)
    values.sum().backward()
    torch.testing.assert_close(values, torch.full((1, 4), 0.25), rtol=2**-10, atol=0)
    assert residual.grad.item() == 4.0


def test_learned_scales_may_change_places() -> None:
    weight = normal(1, 64)
    spec = create({}, scale_dtype="float32")
    one, two = torch.tensor([[0.8]]), torch.tensor([[0.3]])
    straight = fake_quantize(weight, spec, scale=one, scale_residual=two)
    assert torch.equal(fake_quantize(weight, spec, scale=two, scale_residual=one), straight)
    for params in (QuantParams(one, scale_residual=two), QuantParams(two, scale_residual=one)):
        assert torch.equal(dequantize(quantize(weight, params, spec), params, spec), straight)


def test_a_subnormal_residual_scale_is_stored_and_a_negative_or_infinite_one_refused() -> None:
    weight = torch.tensor([[0.0156, 0.0157, 0.0156, 0.0157]])
    params = find_params(weight, create({}))
    assert 0 < params.scale_residual < torch.finfo(torch.float16).tiny
    check_residual_scale(torch.tensor([0.0, 1e-6, 1.0], dtype=torch.float16))
    with pytest.raises(ScaleRangeError):
        check_residual_scale(torch.tensor([-1e-6], dtype=torch.float16))
    with pytest.raises(ScaleRangeError):
        check_residual_scale(torch.tensor([torch.inf], dtype=torch.float16))
    with pytest.raises(WeightError):
        check_residual_scale(torch.tensor([torch.nan], dtype=torch.float16))


def test_there_is_no_range_to_search() -> None:
    spec = create({})
    quantizer = get_quantizer(spec.grid)
    for call in (
        lambda: quantizer.params_from_range(torch.zeros(1, 1), torch.ones(1, 1), spec),
        lambda: quantizer.search_space(torch.ones(1, 1, 4), (1.0,)),
    ):
        with pytest.raises(ConfigError, match=r"got grid='r2q', .* Use refine='alternating'"):
            call()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            {"refine": "greedy"},
            r"`refine` must be one of \[None, 'least_squares', 'alternating'\]: got refine='greedy'",
        ),
        ({"refine": ["alternating"]}, r"got refine=\['alternating'\]"),
        ({"tied": 1}, "`tied` must be True or False: got tied=1. Use False."),
        (
            {"grid": "int", "refine": "alternating"},
            "got refine='alternating', grid='int'. Use grid='r2q', or refine=None.",
        ),
        ({"grid": "ternary", "tied": True}, "got tied=True, grid='ternary'. Use grid='r2q', or tied=False."),
    ],
    ids=str,
)
def test_a_wrong_option_is_refused_by_name_with_a_way_out(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        QuantSpec.create(**{"grid": "r2q", "bits": 2, **wrong})


@each_option
def test_options_come_back_from_plain_values(options: dict[str, object]) -> None:
    spec = create(options)
    assert QuantSpec.create(**spec.to_dict()) == spec
    assert (spec.to_dict()["refine"], spec.to_dict()["tied"]) == (options.get("refine"), options.get("tied", False))
    assert spec.grid.has_residual_scale == (not options.get("tied"))
