"""WHAT a code stands for: grids and their registry. Pure Python, no torch."""

from bitdistiller_peft.grids.base import AffineGrid, CodebookGrid, FineGrid, Grid, ResidualGrid, TernaryGrid
from bitdistiller_peft.grids.minifloat import minifloat_levels
from bitdistiller_peft.grids.normal_float import PUBLISHED_NF4, normal_float_levels
from bitdistiller_peft.grids.registry import get_grid, grid_names, register_grid

__all__ = [
    "PUBLISHED_NF4",
    "AffineGrid",
    "CodebookGrid",
    "FineGrid",
    "Grid",
    "ResidualGrid",
    "TernaryGrid",
    "get_grid",
    "grid_names",
    "minifloat_levels",
    "normal_float_levels",
    "register_grid",
]
