"""Which quantizer handles which family of grids. The set is open: `register_quantizer` takes one more family."""

from __future__ import annotations

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.grids import AffineGrid, CodebookGrid, FineGrid, Grid, ResidualGrid, TernaryGrid
from bitdistiller_peft.quantizers.affine import AffineQuantizer
from bitdistiller_peft.quantizers.base import Quantizer
from bitdistiller_peft.quantizers.codebook import CodebookQuantizer
from bitdistiller_peft.quantizers.fine import FineQuantizer
from bitdistiller_peft.quantizers.residual import ResidualQuantizer
from bitdistiller_peft.quantizers.ternary import TernaryQuantizer

_QUANTIZERS: dict[type[Grid], Quantizer] = {}


def register_quantizer(family: type[Grid], quantizer: Quantizer) -> None:
    """Say how the grids of a family are placed and rounded.

    Raises:
        ConfigError: the family has a quantizer already.
    """
    if family in _QUANTIZERS:
        known = [known.__name__ for known in _QUANTIZERS]
        raise ConfigError(f"`family` must be new: got family={family.__name__}. Registered families: {known}.")
    _QUANTIZERS[family] = quantizer


def get_quantizer(grid: Grid) -> Quantizer:
    """Look up the quantizer of a grid's family.

    Raises:
        ConfigError: nobody registered one.
    """
    for family in type(grid).__mro__:
        if family in _QUANTIZERS:
            return _QUANTIZERS[family]
    raise ConfigError(
        f"`grid` must belong to a family with a quantizer: got grid={grid.name!r} of type {type(grid).__name__}. "
        "Register one with register_quantizer()."
    )


register_quantizer(AffineGrid, AffineQuantizer())
register_quantizer(FineGrid, FineQuantizer())
register_quantizer(CodebookGrid, CodebookQuantizer())
register_quantizer(TernaryGrid, TernaryQuantizer())
register_quantizer(ResidualGrid, ResidualQuantizer())
