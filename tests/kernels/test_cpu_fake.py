"""Fake quantization by the CPU kernels, on every instruction set here: the reference's values, bit for bit, and its
gradients, to the order of summation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from bitdistiller_peft.grids import AffineGrid, CodebookGrid
from bitdistiller_peft.kernels.cpu import best_isa, fake
from bitdistiller_peft.kernels.cpu.library import ISAS, load
from bitdistiller_peft.quantizers import QuantSpec
from tests.kernels import fakes
from tests.kernels.fakes import assert_asks_the_quantizer, results, shifted
from tests.quantizers.samples import GRIDS, LOPSIDED, RESIDUAL_OPTIONS, hard_weight, normal

pytestmark = pytest.mark.skipif(load() is None, reason="the CPU kernels cannot be compiled on this machine")

GROUP_SIZES = (-1, 12, 8, 2, "tensor")
SPECS = [(grid, bits, {}) for grid, bits in GRIDS] + [("r2q", 2, options) for options in RESIDUAL_OPTIONS]


@pytest.fixture(params=ISAS[: ISAS.index(best_isa()) + 1])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(fake, "isa", lambda: ISAS.index(request.param))
    return str(request.param)


def assert_same(weight: Tensor, spec: QuantSpec, learned: dict[str, Tensor]) -> None:
    fakes.assert_same("cpu", weight, spec, learned)


@pytest.mark.parametrize(("grid", "bits", "options"), SPECS, ids=str)
def test_values_and_gradients_are_those_of_the_reference(grid: str, bits: int, options: dict, isa: str) -> None:
    weight = hard_weight(24)
    for size, gradient in itertools.product(GROUP_SIZES, ("exact", "ste")):
        dtype = "float32" if size == 2 else "float16"
        spec = QuantSpec.create(grid, bits, group_size=size, scale_dtype=dtype, gradient=gradient, **options)
        assert_same(weight, spec, {})
        assert_same(weight, spec, shifted(weight, spec))


@pytest.mark.parametrize("grid", ["int", "nf", "ternary", "r2q"])
def test_any_width_and_stack_of_weights(grid: str, isa: str) -> None:
    for shape, size in (((3, 43), -1), ((2, 5, 7), -1), ((2, 6, 9), "tensor"), ((1, 1), -1), ((5, 33), 11)):
        spec = QuantSpec.create(grid, 2 if grid != "nf" else 3, group_size=size)
        assert_same(normal(*shape, seed=4), spec, {})
        assert_same(normal(*shape, seed=4), spec, shifted(normal(*shape, seed=4), spec))


def test_long_groups_are_cut_and_put_together_again(isa: str) -> None:
    for shape in ((40, 1024), (1, 16411)):  # the second a prime: it cannot be cut
        for grid in ("int", "ternary", "nf_sym"):
            spec = QuantSpec.create(grid, 2, group_size="tensor")
            assert_same(normal(*shape, seed=5), spec, {})
            assert_same(normal(*shape, seed=5), spec, shifted(normal(*shape, seed=5), spec))


def test_the_released_arithmetic_and_bounded_zero_points(isa: str) -> None:
    halves = torch.tensor([[0.0, 0.5, 1.5, 2.5, 3.0]])  # of a step: the released code rounds them away from zero
    for weight in (hard_weight(24), halves):
        assert_same(weight, QuantSpec.create("int", 2, group_size=-1, arithmetic="released"), {})
    spec = QuantSpec.create("int", 2, group_size=12, scale_dtype="float32", zero_point_range=(1, 2))
    assert_same(hard_weight(24), spec, {})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("grid", ["int", "int_sym", "nf", "r2q"])
def test_what_is_not_finite_stays_visible(grid: str, bad: float, isa: str) -> None:
    weight = normal(4, 48)
    weight[1, 17], weight[2, 0], weight[3, 47] = bad, bad, bad
    spec = QuantSpec.create(grid, 3 if grid == "nf" else 2, group_size=24)
    for learned in ({}, shifted(normal(4, 48), spec)):
        (values, _), (wanted, _) = (results(b, weight, spec, learned) for b in ("cpu", "reference"))
        assert torch.equal(values.isfinite(), wanted.isfinite())
        assert torch.equal(values.nan_to_num(0, 0, 0), wanted.nan_to_num(0, 0, 0))


def test_lists_of_levels_of_ones_own(isa: str) -> None:
    wide = CodebookGrid("wide", 5, levels=tuple((i - 16) / 16 for i in range(32)), is_symmetric=True)  # too many
    for grid in (LOPSIDED, wide):
        assert_same(hard_weight(24), QuantSpec(grid, 12, torch.float32), {})


def test_a_quantizer_of_ones_own_is_asked_itself() -> None:
    assert_asks_the_quantizer(fake.SWEEPS)


def test_the_first_of_equal_extremes_gets_the_gradient(isa: str) -> None:
    weight = torch.tensor([[0.5, -1.0, 1.0, 1.0, -1.0, 0.25, 0.0, -1.0, 1.0, 0.5]])
    for grid in ("int", "int_sym", "nf"):
        spec = QuantSpec.create(grid, 3, group_size=-1)
        assert isinstance(spec.grid, (AffineGrid, CodebookGrid))
        assert_same(weight, spec, {})


def test_threads_change_nothing(isa: str) -> None:
    before = torch.get_num_threads()
    spec, weight = QuantSpec.create("nf", 3, group_size=16), normal(64, 64)
    try:
        torch.set_num_threads(1)
        one = results("cpu", weight, spec, {})
        torch.set_num_threads(2)
        two = results("cpu", weight, spec, {})
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1][0], two[1][0])
