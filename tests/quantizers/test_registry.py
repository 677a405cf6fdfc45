"""A family of grids finds its quantizer, its subclasses too; the set is open, but no family has two."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.grids import AffineGrid, CodebookGrid, Grid, get_grid
from bitdistiller_peft.quantizers import QuantParams, QuantSpec, fake_quantize, get_quantizer, register_quantizer
from bitdistiller_peft.quantizers import registry as module
from bitdistiller_peft.quantizers.affine import AffineQuantizer
from bitdistiller_peft.quantizers.codebook import CodebookQuantizer


@dataclass(frozen=True)
class SpecialAffine(AffineGrid):
    """A grid whose family is registered under its parent."""


@dataclass(frozen=True)
class Stranger(Grid):
    """A grid that no quantizer knows."""


def test_each_family_has_its_quantizer() -> None:
    assert isinstance(get_quantizer(get_grid("int", 2)), AffineQuantizer)
    assert isinstance(get_quantizer(get_grid("nf", 2)), CodebookQuantizer)


def test_a_subclass_is_served_by_the_quantizer_of_its_family() -> None:
    grid = SpecialAffine("special", 2)
    assert get_quantizer(grid) is get_quantizer(get_grid("int", 2))
    assert fake_quantize(torch.tensor([[0.0, 3.0]]), QuantSpec(grid, -1)).tolist() == [[0.0, 3.0]]


def test_a_grid_without_a_quantizer_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"`grid` must .*: got grid='odd' of type Stranger\. Register one"):
        get_quantizer(Stranger("odd", 2))


def test_a_new_family_can_be_added_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_QUANTIZERS", dict(module._QUANTIZERS))
    quantizer = AffineQuantizer()
    register_quantizer(Stranger, quantizer)
    assert get_quantizer(Stranger("odd", 2)) is quantizer
    with pytest.raises(
        ConfigError, match=r"`family` must be new: got family=Stranger\. Registered families: .*'Stranger'"
    ):
        register_quantizer(Stranger, quantizer)


@pytest.mark.parametrize("family", [AffineGrid, CodebookGrid])
def test_the_families_of_the_house_cannot_be_replaced(family: type[Grid]) -> None:
    with pytest.raises(ConfigError, match="must be new"):
        register_quantizer(family, AffineQuantizer())


@pytest.mark.parametrize(
    ("name", "bits"),
    [(name, bits) for name in ("int", "int_sym", "int_fine") for bits in (2, 3, 4, 8)]
    + [(name, bits) for name in ("nf", "nf_sym") for bits in (2, 3, 4)]
    + [(name, bits) for name in ("fp", "fp_sym") for bits in (3, 4)]
    + [("ternary", 2), ("r2q", 2)],
)
def test_outermost_levels_move_by_the_reach_where_scales_grow_by_one(name: str, bits: int) -> None:
    spec = QuantSpec(get_grid(name, bits), 32)
    quantizer, grid = get_quantizer(spec.grid), spec.grid
    one = torch.ones(1)
    zero = torch.ones(1, dtype=torch.uint8) if grid.has_zero_point else None
    codes = torch.arange(grid.num_levels)[None]

    def half_range(scale: float) -> float:
        params = QuantParams(
            scale * one,
            zero,
            scale * one if grid.has_negative_scale else None,
            one * 0.5 if grid.has_residual_scale else None,
        )
        values = quantizer.dequantize(codes, params, spec)
        return float(values.max() - values.min()) / 2

    assert half_range(2.0) - half_range(1.0) == pytest.approx(grid.reach, rel=1e-6)
