"""A family of grids finds its quantizer, its subclasses too; the set is open, but no family has two."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.grids import AffineGrid, CodebookGrid, Grid, get_grid
from bitdistiller_peft.quantizers import QuantSpec, fake_quantize, get_quantizer, register_quantizer
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
