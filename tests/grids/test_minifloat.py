"""The levels of tiny floats are those that their bits spell, with one zero."""

from __future__ import annotations

import pytest

from bitdistiller_peft.grids import get_grid, minifloat_levels

# AFPQ (arXiv 2311.01792), appendix A
E2M1 = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M0 = (1.0, 2.0, 4.0)


def decode(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """One code, bit by bit: sign, exponent with the bias that makes 1 the smallest normal number, mantissa."""
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = (code >> mantissa_bits) % 2**exponent_bits
    fraction = (code % 2**mantissa_bits) / 2**mantissa_bits
    return sign * (fraction if exponent == 0 else 2.0 ** (exponent - 1) * (1 + fraction))


@pytest.mark.parametrize(("bits", "positive"), [(3, E2M0), (4, E2M1)])
@pytest.mark.parametrize("name", ["fp", "fp_sym"])
def test_levels_are_the_published_ones(name: str, bits: int, positive: tuple[float, ...]) -> None:
    grid = get_grid(name, bits)
    assert grid.levels == (*(-level for level in reversed(positive)), 0.0, *positive)
    assert (grid.num_levels, grid.zero_code) == (2**bits - 1, 2 ** (bits - 1) - 1)  # one code is spare
    assert grid.has_negative_scale == (name == "fp")


@pytest.mark.parametrize(("exponent_bits", "mantissa_bits"), [(1, 0), (1, 2), (2, 0), (2, 1), (3, 0), (3, 2)])
def test_levels_are_what_the_bits_spell(exponent_bits: int, mantissa_bits: int) -> None:
    width = 1 + exponent_bits + mantissa_bits
    spelt = {decode(code, exponent_bits, mantissa_bits) for code in range(2**width)}  # 0 and -0 are equal
    assert minifloat_levels(exponent_bits, mantissa_bits) == tuple(sorted(spelt))
    assert len(spelt) == 2**width - 1
