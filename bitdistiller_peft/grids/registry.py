"""From a name and a width to a grid. The set is open: `register_grid` takes one more factory.

A factory maps `bits` to a `Grid` and raises `ConfigError` for widths it does not know. A new codebook needs nothing
else; a new family (neither affine nor a codebook) also needs a quantizer, see `quantizers.registry`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.grids.base import AffineGrid, CodebookGrid, FineGrid, Grid, ResidualGrid, TernaryGrid
from bitdistiller_peft.grids.minifloat import EXPONENT_BITS, minifloat_levels
from bitdistiller_peft.grids.normal_float import PUBLISHED_NF4, normal_float_levels
from bitdistiller_peft.registry import add_new, look_up

GridFactory = Callable[[int], Grid]

_FACTORIES: dict[str, GridFactory] = {}


def register_grid(name: str, factory: GridFactory) -> None:
    """Add a grid under a new name.

    Args:
        name: the name users write in `BitDistillerConfig(grid=...)` and that checkpoints store.
        factory: maps `bits` to the grid, or raises `ConfigError`.

    Raises:
        ConfigError: the name is taken.
    """
    add_new(_FACTORIES, "grid", name, factory)


def grid_names() -> list[str]:
    """List the registered names, sorted."""
    return sorted(_FACTORIES)


def get_grid(name: str, bits: int) -> Grid:
    """Look up a grid.

    Args:
        name: a registered name, e.g. ``"int"`` or ``"nf"``.
        bits: code width.

    Raises:
        UnknownNameError: no grid has this name.
        ConfigError: the grid has no such width.
    """
    factory = look_up(_FACTORIES, "grid", name)
    if not isinstance(bits, int) or isinstance(bits, bool):
        hint = "bits=2, in which ternary codes are stored" if name == "ternary" else "bits=2, 3 or 4"
        raise ConfigError(f"`bits` must be an integer: got bits={bits!r}. Use {hint}.")
    return factory(bits)


def _check_bits(name: str, bits: int, allowed: Collection[int]) -> None:
    if bits not in allowed:
        raise ConfigError(
            f"`bits` must be one of {sorted(allowed)} for grid={name!r}: got bits={bits}. "
            f"Use bits={min(allowed)} for the smallest file."
        )


def _affine(bits: int, *, name: str, is_symmetric: bool) -> Grid:
    _check_bits(name, bits, (2, 3, 4, 8))
    return AffineGrid(name, bits, is_symmetric=is_symmetric)


def _fine(bits: int) -> Grid:
    _check_bits("int_fine", bits, (2, 3, 4, 8))
    return FineGrid("int_fine", bits)


def _normal_float(bits: int, *, name: str, is_symmetric: bool) -> Grid:
    _check_bits(name, bits, (2, 3, 4))
    return CodebookGrid(name, bits, levels=normal_float_levels(bits), is_symmetric=is_symmetric)


def _minifloat(bits: int, *, name: str, is_symmetric: bool) -> Grid:
    _check_bits(name, bits, (3, 4))
    levels = minifloat_levels(EXPONENT_BITS, bits - 1 - EXPONENT_BITS)
    return CodebookGrid(name, bits, levels=levels, is_symmetric=is_symmetric)


def _published_nf4(bits: int) -> Grid:
    _check_bits("nf4", bits, (4,))
    return CodebookGrid("nf4", bits, levels=PUBLISHED_NF4, is_symmetric=True)


def _ternary(bits: int) -> Grid:
    _check_bits("ternary", bits, (2,))
    return TernaryGrid("ternary", bits, is_symmetric=True)


def _residual(bits: int) -> Grid:
    _check_bits("r2q", bits, (2,))
    return ResidualGrid("r2q", bits)


for _suffix, _symmetric in (("", False), ("_sym", True)):
    register_grid(f"int{_suffix}", partial(_affine, name=f"int{_suffix}", is_symmetric=_symmetric))
    register_grid(f"nf{_suffix}", partial(_normal_float, name=f"nf{_suffix}", is_symmetric=_symmetric))
    register_grid(f"fp{_suffix}", partial(_minifloat, name=f"fp{_suffix}", is_symmetric=_symmetric))
register_grid("int_fine", _fine)
register_grid("nf4", _published_nf4)
register_grid("ternary", _ternary)
register_grid("r2q", _residual)
