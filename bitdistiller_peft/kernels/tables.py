"""What a code of each family of grids stands for, as two numbers per group: the one formula of all kernels.

    value[code] = (a[code] - c * q) * p + b[code] * q

`p` is the scale of the group, `q` its zero point or its second scale. At most one operation rounds, so the result is
the reference's bit for bit. The set is open: a new family registers its form, or runs on the reference backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.grids import (
    AffineGrid,
    CodebookGrid,
    FineGrid,
    Grid,
    ResidualGrid,
    TernaryGrid,
    get_grid,
    grid_names,
)

TABLE_SIZE = 16
TIED = "/tied"


class TableForm(NamedTuple):
    """Coefficients of the formula, and which of `QuantParams`' fields is `q`.

    Attributes:
        a: one coefficient per code, at most 16.
        b: likewise.
        c: code steps that a step of `q` is where that is a zero point, else 0.
        second: ``"zero_point"``, ``"scale_negative"`` or another field of `QuantParams`; `None` where `q` is unused.
    """

    a: tuple[float, ...]
    b: tuple[float, ...]
    c: float
    second: str | None


_FORMS: dict[type[Grid], Callable[[Grid], TableForm | None]] = {}


def register_table_form(family: type[Grid], form: Callable[[Grid], TableForm | None]) -> None:
    """Say what the codes of a family of grids stand for.

    Args:
        family: a `Grid` subclass.
        form: maps a grid to its form, or to `None` where no form fits.

    Raises:
        ConfigError: the family has a form already.
    """
    if family in _FORMS:
        known = [known.__name__ for known in _FORMS]
        raise ConfigError(f"`family` must be new: got family={family.__name__}. Registered families: {known}.")
    _FORMS[family] = form


@lru_cache(maxsize=256)
def table_form(name: str, bits: int) -> TableForm | None:
    """The form of a grid by its key; `None` where the kernels cannot express it."""
    grid = get_grid(name.removesuffix(TIED), bits)
    return form_of(replace(grid, is_tied=True) if name.endswith(TIED) and isinstance(grid, ResidualGrid) else grid)


def grid_key(grid: Grid) -> str | None:
    """The name under which `table_form` finds a grid; `None` for one that only this process knows.

    Operators take names, not objects: a compiled program may outlive the process that made it.
    """
    plain, is_tied = grid, isinstance(grid, ResidualGrid) and grid.is_tied
    if isinstance(grid, ResidualGrid):
        plain = replace(grid, is_tied=False)
    if grid.name not in grid_names() or get_grid(grid.name, grid.bits) != plain:
        return None
    return grid.name + TIED * is_tied


def form_of(grid: Grid) -> TableForm | None:
    """The form of a grid, its coefficients repeated to `TABLE_SIZE`; `None` where the kernels cannot express it."""
    if grid.bits not in {2, 3, 4, 8}:
        return None
    # a subclass may have a quantizer of its own, so it needs a form of its own
    form = _FORMS[type(grid)](grid) if type(grid) in _FORMS else None
    return None if form is None else _filled(form, grid)


def _filled(form: TableForm, grid: Grid) -> TableForm:
    if grid.bits == 8:
        return form
    size = 1 << grid.bits

    def filled(row: tuple[float, ...]) -> tuple[float, ...]:
        # codes that a grid does not use never occur; their entries only have to be finite
        return (*row, *(0.0,) * (size - len(row))) * (TABLE_SIZE // size)

    return form._replace(a=filled(form.a), b=filled(form.b))


def _affine(grid: Grid) -> TableForm | None:
    if not isinstance(grid, AffineGrid):
        return None
    start = -(grid.fixed_zero_point or 0)
    codes = tuple(float(start + code) for code in range(min(grid.num_levels, TABLE_SIZE)))
    is_symmetric = grid.fixed_zero_point is not None
    return TableForm(codes, (0.0,) * len(codes), 0.0 if is_symmetric else 1.0, None if is_symmetric else "zero_point")


def _fine(grid: Grid) -> TableForm | None:
    if not isinstance(grid, FineGrid):
        return None
    codes = tuple(code - grid.first_zero for code in range(min(grid.num_levels, TABLE_SIZE)))
    return TableForm(codes, (0.0,) * len(codes), grid.zero_step, "zero_point")


def _codebook(grid: Grid) -> TableForm | None:
    if not isinstance(grid, CodebookGrid) or grid.bits > 4:
        return None
    zeros = (0.0,) * len(grid.levels)
    if not grid.has_negative_scale:
        return TableForm(grid.levels, zeros, 0.0, None)
    positive = tuple(max(level, 0.0) for level in grid.levels)
    negative = tuple(min(level, 0.0) for level in grid.levels)
    return TableForm(positive, negative, 0.0, "scale_negative")


def _residual(grid: Grid) -> TableForm | None:
    if not isinstance(grid, ResidualGrid) or grid.bits != 2:
        return None
    if grid.is_tied:
        return TableForm((-1.5, -0.5, 0.5, 1.5), (0.0,) * 4, 0.0, None)
    return TableForm((-1.0, -1.0, 1.0, 1.0), (-1.0, 1.0, -1.0, 1.0), 0.0, "scale_residual")


register_table_form(AffineGrid, _affine)
register_table_form(FineGrid, _fine)
register_table_form(TernaryGrid, _affine)
register_table_form(ResidualGrid, _residual)
register_table_form(CodebookGrid, _codebook)
