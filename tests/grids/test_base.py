"""A grid says how many codes it has, what they mean, and which parameters a group stores."""

from __future__ import annotations

import dataclasses

import pytest

from bitdistiller_peft.grids import AffineGrid, CodebookGrid, Grid, ResidualGrid, TernaryGrid, get_grid


def test_an_asymmetric_affine_grid_stores_a_zero_point_per_group() -> None:
    grid = AffineGrid("int", 3)
    assert (grid.num_levels, grid.max_code, grid.fixed_zero_point) == (8, 7, None)
    assert (grid.has_zero_point, grid.has_negative_scale) == (True, False)


def test_a_symmetric_affine_grid_has_one_zero_point_for_all() -> None:
    grid = AffineGrid("int_sym", 3, is_symmetric=True)
    assert (grid.num_levels, grid.max_code, grid.fixed_zero_point) == (8, 7, 4)
    assert (grid.has_zero_point, grid.has_negative_scale) == (False, False)


def test_a_codebook_has_as_many_codes_as_levels_and_a_scale_for_each_sign() -> None:
    grid = CodebookGrid("fp3", 3, levels=(-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0))
    assert (grid.num_levels, grid.zero_code) == (7, 3)  # three bits could hold eight
    assert grid.midpoints == (-3.0, -1.5, -0.5, 0.5, 1.5, 3.0)
    assert (grid.has_zero_point, grid.has_negative_scale) == (False, True)
    assert not dataclasses.replace(grid, is_symmetric=True).has_negative_scale


def test_a_plain_grid_uses_every_code_and_stores_nothing_but_a_scale() -> None:
    grid = Grid("plain", 2)
    assert (grid.num_levels, grid.has_zero_point, grid.has_negative_scale) == (4, False, False)


def test_ternary_codes_are_three_around_a_fixed_zero() -> None:
    grid = TernaryGrid("ternary", 2, is_symmetric=True)
    assert (grid.num_levels, grid.max_code, grid.fixed_zero_point) == (3, 2, 1)
    assert (grid.has_zero_point, grid.has_negative_scale, grid.has_residual_scale) == (False, False, False)


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_residual_grid_stores_a_second_scale_unless_it_is_tied(is_tied: bool) -> None:
    grid = ResidualGrid("r2q", 2, is_tied=is_tied)
    assert (grid.num_levels, grid.has_residual_scale) == (4, not is_tied)
    assert (grid.has_zero_point, grid.has_negative_scale) == (False, False)


@pytest.mark.parametrize("name", ["int", "int_sym", "nf", "nf_sym", "fp", "fp_sym"])
def test_equal_grids_are_equal_and_hash_alike(name: str) -> None:
    one, two = get_grid(name, 3), get_grid(name, 3)
    assert one == two
    assert hash(one) == hash(two)
    assert one != get_grid(name, 4)


def test_a_grid_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_grid("int", 2).bits = 3
