"""A name and a width give the right grid; the set is open; what is unknown is refused with the nearest name."""

from __future__ import annotations

import pytest

from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.grids import (
    AffineGrid,
    CodebookGrid,
    ResidualGrid,
    TernaryGrid,
    get_grid,
    grid_names,
    register_grid,
)
from bitdistiller_peft.grids import registry as module


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_integers_come_in_four_widths(bits: int) -> None:
    assert get_grid("int", bits) == AffineGrid("int", bits)
    assert get_grid("int_sym", bits) == AffineGrid("int_sym", bits, is_symmetric=True)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_floats_come_in_three_widths(bits: int) -> None:
    for name, is_symmetric in (("nf", False), ("nf_sym", True)):
        grid = get_grid(name, bits)
        assert isinstance(grid, CodebookGrid)
        assert (grid.name, grid.bits, grid.num_levels, grid.is_symmetric) == (name, bits, 2**bits, is_symmetric)


@pytest.mark.parametrize("bits", [3, 4])
def test_minifloats_come_in_two_widths(bits: int) -> None:
    for name, is_symmetric in (("fp", False), ("fp_sym", True)):
        grid = get_grid(name, bits)
        assert isinstance(grid, CodebookGrid)
        assert (grid.name, grid.bits, grid.num_levels, grid.is_symmetric) == (name, bits, 2**bits - 1, is_symmetric)


def test_ternary_and_residual_codes_take_two_bits() -> None:
    assert get_grid("ternary", 2) == TernaryGrid("ternary", 2, is_symmetric=True)
    assert get_grid("r2q", 2) == ResidualGrid("r2q", 2)


def test_ternary_by_its_other_name_is_told_the_width_of_its_codes() -> None:
    with pytest.raises(ConfigError, match=r"got bits=1\.58\. Use bits=2, in which ternary codes are stored\."):
        get_grid("ternary", 1.58)


def test_names_are_listed_in_order() -> None:
    assert {"int", "int_sym", "nf", "nf_sym", "fp", "fp_sym", "ternary", "r2q"} <= set(grid_names())
    assert grid_names() == sorted(grid_names())


@pytest.mark.parametrize(("wrong", "near"), [("int_symm", "int_sym"), ("nf3", "nf"), ("int_sim", "int_sym")])
def test_a_misspelt_name_is_refused_with_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(UnknownNameError) as refusal:
        get_grid(wrong, 2)
    assert str(refusal.value) == f"`grid` must be one of {grid_names()}: got grid={wrong!r}. Did you mean {near!r}?"


@pytest.mark.parametrize("wrong", ["ggml", "", None, 2, [1, 2], {"name": 3}])
def test_a_name_that_is_near_to_nothing_is_refused_without_a_guess(wrong: object) -> None:
    with pytest.raises(UnknownNameError) as refusal:
        get_grid(wrong, 2)
    assert str(refusal.value) == f"`grid` must be one of {grid_names()}: got grid={wrong!r}."


LACKING = [(name, bits) for name in ("int", "int_sym", "nf", "nf_sym") for bits in (-1, 0, 1, 5, 16)]
LACKING += [("nf", 8), ("fp", 2), ("fp_sym", 2), ("fp", 8), ("ternary", 1), ("ternary", 3), ("r2q", 1), ("r2q", 4)]


@pytest.mark.parametrize(("name", "bits"), LACKING)
def test_a_width_that_the_grid_lacks_is_refused(name: str, bits: int) -> None:
    with pytest.raises(ConfigError, match=rf"`bits` must be one of \[[2-8, ]+\] for grid='{name}': got bits={bits}\."):
        get_grid(name, bits)


@pytest.mark.parametrize("bits", [2.0, "2", None, True])
def test_a_width_that_is_no_integer_is_refused(bits: object) -> None:
    with pytest.raises(ConfigError, match=r"`bits` must be an integer: got bits=.*\. Use bits=2, 3 or 4\."):
        get_grid("int", bits)


def test_an_outsider_can_add_a_grid_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FACTORIES", dict(module._FACTORIES))
    mine = CodebookGrid("mine", 2, levels=(-1.0, 0.0, 1.0))
    register_grid("mine", lambda bits: mine)
    assert get_grid("mine", 2) is mine
    assert "mine" in grid_names()
    for taken in ("mine", "int"):
        with pytest.raises(ConfigError, match=f"`name` must be new: got name='{taken}'. Registered grids: "):
            register_grid(taken, lambda bits: mine)
