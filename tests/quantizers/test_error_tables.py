"""On Gaussian weights each grid errs by as much as was published, and in the published order."""

from __future__ import annotations

from functools import cache

import pytest

from bitdistiller_peft.quantizers import QuantSpec, fake_quantize
from tests.quantizers.samples import normal

# Mean squared error over mean square, N(0, 1), groups of 128: AFPQ (arXiv 2311.01792) and BitDistiller's grids,
# measured with other code. NF2 and the symmetric integers are ours and have no published figure.
PUBLISHED = {
    ("int", 2): 0.2532,
    ("int", 3): 0.0465,
    ("int", 4): 0.0101,
    ("nf_sym", 3): 0.0440,
    ("nf", 3): 0.0390,
    ("nf_sym", 4): 0.0091,
    ("nf", 4): 0.0085,
    ("fp_sym", 3): 0.0570,
    ("fp", 3): 0.0512,
    ("fp_sym", 4): 0.0119,
    ("fp", 4): 0.0112,
    ("r2q", 2): 0.1285,
}


@cache
def relative_error(grid: str, bits: int) -> float:
    weight = normal(1024, 1024)
    wrong = fake_quantize(weight, QuantSpec.create(grid, bits, group_size=128)) - weight
    return float(wrong.square().mean() / weight.square().mean())


@pytest.mark.parametrize(("kind", "error"), PUBLISHED.items(), ids=str)
def test_the_error_is_the_published_one(kind: tuple[str, int], error: float) -> None:
    """Within half a unit of the last published digit or 0.6 %, whichever is more.

    A million weights spread by 0.13 to 0.27 %; and scales that are rounded up to fp16 add 0.04 %: FP3 has 0.05127 on 16
    million weights (0.05125 with fp32 scales), so that .0512 is an ordinary draw.
    """
    assert relative_error(*kind) == pytest.approx(error, rel=0.006, abs=5e-5)


@pytest.mark.parametrize("bits", [3, 4])
def test_normal_floats_beat_integers_and_two_scales_beat_one(bits: int) -> None:
    assert relative_error("nf", bits) < relative_error("nf_sym", bits) < relative_error("int", bits)


@pytest.mark.parametrize("grid", ["int", "int_sym", "nf", "nf_sym"])
def test_a_bit_more_is_worth_a_factor_of_three(grid: str) -> None:
    assert relative_error(grid, 2) > 3 * relative_error(grid, 3) > 9 * relative_error(grid, 4)


@pytest.mark.parametrize("group_size", [32, 64])
def test_smaller_groups_err_less(group_size: int) -> None:
    weight = normal(128, 1024)

    def error(size: int) -> float:
        return float((fake_quantize(weight, QuantSpec.create("int", 2, group_size=size)) - weight).square().mean())

    assert error(group_size) < error(2 * group_size)
