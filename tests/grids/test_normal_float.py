"""The computed NormalFloat levels are the published NF3 and NF4, and NF2 is made the same way."""

from __future__ import annotations

from itertools import pairwise
from statistics import NormalDist

import pytest

from bitdistiller_peft.grids import get_grid, normal_float_levels

# QLoRA (arXiv 2305.14314), appendix E, and AFPQ (arXiv 2311.01792), appendix A: computed by others in fp32.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NF3 = (
    -1.0,
    -0.5350227355957031,
    -0.2469314038753510,
    0.0,
    0.1833375245332718,
    0.3819939494132996,
    0.6229856610298157,
    1.0,
)


@pytest.mark.parametrize(("bits", "published"), [(3, NF3), (4, NF4)])
def test_levels_are_the_published_ones(bits: int, published: tuple[float, ...]) -> None:
    assert normal_float_levels(bits) == pytest.approx(published, abs=2**-22)  # a few units of fp32's last place


def test_two_bits_give_one_negative_level_and_a_middle_one() -> None:
    assert normal_float_levels(2) == pytest.approx((-1.0, 0.0, 0.4358, 1.0), abs=5e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_levels_rise_from_minus_one_through_an_exact_zero_to_one(bits: int) -> None:
    levels = normal_float_levels(bits)
    assert len(levels) == 2**bits
    assert list(levels) == sorted(set(levels))
    assert (levels[0], levels[2 ** (bits - 1) - 1], levels[-1]) == (-1.0, 0.0, 1.0)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_each_side_is_evenly_spaced_in_probability(bits: int) -> None:
    levels, offset = normal_float_levels(bits), 1 - 0.5 * (1 / 2 ** (bits + 1) + 1 / (2 ** (bits + 1) - 2))
    largest = NormalDist().inv_cdf(offset)
    shares = [NormalDist().cdf(level * largest) for level in levels]
    zero = 2 ** (bits - 1) - 1
    for side in (shares[: zero + 1], shares[zero:]):
        gaps = [high - low for low, high in pairwise(side)]
        assert gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-9)


def test_the_grids_hold_these_levels() -> None:
    for name in ("nf", "nf_sym"):
        assert get_grid(name, 4).levels == normal_float_levels(4)
