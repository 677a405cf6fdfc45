"""Fake quantization by the Triton programs: the reference's values, bit for bit, and its gradients."""

from __future__ import annotations

import pytest
import torch

from bitdistiller_peft.grids import CodebookGrid
from bitdistiller_peft.kernels.triton import fake, ops
from bitdistiller_peft.quantizers import QuantSpec
from tests.kernels.fakes import assert_asks_the_quantizer, assert_same, results, shifted
from tests.quantizers.samples import GRIDS, LOPSIDED, RESIDUAL_OPTIONS, hard_weight, normal

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not ops.is_usable(torch.device("cpu")), reason="needs Triton's interpreter"
)
SPECS = [(grid, bits, {}) for grid, bits in GRIDS] + [("r2q", 2, options) for options in RESIDUAL_OPTIONS]


@pytest.mark.parametrize(("grid", "bits", "options"), SPECS, ids=str)
def test_values_and_gradients_are_those_of_the_reference(grid: str, bits: int, options: dict[str, object]) -> None:
    weight = hard_weight(24)
    for size, gradient in ((-1, "exact"), (8, "ste"), (2, "exact"), ("tensor", "ste")):
        dtype = "float32" if size == 2 else "float16"
        spec = QuantSpec.create(grid, bits, group_size=size, scale_dtype=dtype, gradient=gradient, **options)  # type: ignore[arg-type]
        assert_same("triton", weight, spec, {})
        assert_same("triton", weight, spec, shifted(weight, spec))


@pytest.mark.parametrize("grid", ["int", "nf", "ternary", "r2q"])
def test_any_width_and_long_groups(grid: str) -> None:
    for shape, size in (
        ((3, 43), -1),
        ((2, 5, 7), -1),
        ((1, 1), -1),
        ((5, 33), 11),
        ((2, 1500), -1),
        ((20, 1024), "tensor"),
    ):
        spec = QuantSpec.create(grid, 2 if grid != "nf" else 3, group_size=size)  # type: ignore[arg-type]
        assert_same("triton", normal(*shape, seed=4), spec, {})
        assert_same("triton", normal(*shape, seed=4), spec, shifted(normal(*shape, seed=4), spec))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, under the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("grid", ["int", "nf", "r2q"])
def test_what_is_not_finite_stays_visible(grid: str, bad: float) -> None:
    weight = normal(4, 48)
    weight[1, 17], weight[2, 0], weight[3, 47] = bad, bad, bad
    spec = QuantSpec.create(grid, 3 if grid == "nf" else 2, group_size=24)
    for learned in ({}, shifted(normal(4, 48), spec)):
        (values, _), (wanted, _) = (results(b, weight, spec, learned) for b in ("triton", "reference"))
        assert torch.equal(values.isfinite(), wanted.isfinite())


def test_lists_of_levels_of_ones_own() -> None:
    wide = CodebookGrid("wide", 5, levels=tuple((i - 16) / 16 for i in range(32)), is_symmetric=True)  # too many
    for grid in (LOPSIDED, wide):
        assert_same("triton", hard_weight(24), QuantSpec(grid, 12, torch.float32), {})


def test_the_programs_are_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    launch = fake._launch
    monkeypatch.setattr(fake, "_launch", lambda name, *rest, **more: (names.append(name), launch(name, *rest, **more)))
    weight = normal(4, 48)
    spec = QuantSpec.create("int", 2, group_size=24)
    assert_same("triton", weight, spec, {})
    assert set(names) == {"ends", "values", "gradients"}


def test_a_quantizer_of_ones_own_is_asked_itself() -> None:
    assert_asks_the_quantizer(fake.SWEEPS)
