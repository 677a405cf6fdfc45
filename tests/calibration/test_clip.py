"""The clip search finds what an exhaustive search on the activations themselves finds, for every grid and grouping."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from bitdistiller_peft.calibration import clip
from bitdistiller_peft.calibration.capture import Gram
from bitdistiller_peft.calibration.clip import FACTORS, group_width, search_range
from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.quantizers import QuantSpec, dequantize, fake_quantize, get_quantizer, quantize, to_groups
from tests.reference.clip_search import output_error, search

OUT, IN, TOKENS = 12, 64, 90
GRIDS = [("int", 2), ("int", 3), ("int_sym", 2), ("nf", 2), ("nf", 3), ("nf_sym", 3), ("fp", 3), ("fp_sym", 4)]
GROUP_SIZES: list[int | Literal["tensor"]] = [16, -1, "tensor"]


def gram_of(inputs: Tensor, width: int) -> Tensor:
    gram = Gram(width)
    gram.add(inputs)
    mean = gram.mean()
    assert mean is not None
    return mean


@pytest.fixture
def weight(generator: torch.Generator) -> Tensor:
    return 0.1 * torch.randn(OUT, IN, generator=generator)


@pytest.fixture
def inputs(generator: torch.Generator) -> Tensor:
    """Correlated, uneven activations: with white ones, the weight error alone would do."""
    mix = torch.randn(IN, IN, generator=generator) * torch.rand(IN, generator=generator).square()
    return torch.randn(TOKENS, IN, generator=generator) @ mix


def test_the_gram_form_is_the_output_error(weight: Tensor, inputs: Tensor) -> None:
    spec = QuantSpec.create("int", 2, group_size=16)
    moved = (fake_quantize(weight, spec) - weight).reshape(OUT, -1, 16)
    gram = gram_of(inputs, 16).double()
    by_gram = torch.einsum("ogi,gij,ogj->og", moved.double(), gram, moved.double())
    torch.testing.assert_close(by_gram, output_error(moved, inputs), rtol=1e-5, atol=0)
    found = search_range(weight, gram, spec)
    torch.testing.assert_close(found.error_before.double(), by_gram, rtol=1e-4, atol=1e-9)
    energy = output_error(weight.reshape(OUT, -1, 16), inputs)
    torch.testing.assert_close(found.energy.double(), energy, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("clamp_weight", [False, True], ids=["as-it-is", "clamped"])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("grid", "bits"), GRIDS)
def test_the_range_is_that_of_an_exhaustive_search(
    grid: str, bits: int, group_size: int | Literal["tensor"], clamp_weight: bool, weight: Tensor, inputs: Tensor
) -> None:
    spec = QuantSpec.create(grid, bits, group_size=group_size)
    gram = gram_of(inputs, group_width(spec, IN))
    found = search_range(weight, gram, spec, clamp_weight=clamp_weight)
    low, high, error = search(weight, inputs, spec, FACTORS, clamp_weight=clamp_weight)
    torch.testing.assert_close(found.error_after.double(), error, rtol=1e-4, atol=1e-9)
    same = (found.low == low) & (found.high == high)
    assert same.float().mean() > 0.98, f"{int((~same).sum())} of {same.numel()} ranges differ"
    assert bool((found.error_after <= found.error_before).all())


@pytest.mark.parametrize(("grid", "bits"), GRIDS)
def test_tiles_change_nothing(
    grid: str, bits: int, weight: Tensor, inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = QuantSpec.create(grid, bits, group_size=16)
    gram = gram_of(inputs, 16)
    whole = search_range(weight, gram, spec)
    monkeypatch.setattr(clip, "TILE_ELEMENTS", 16 * 10 * 5)  # five rows of one group, and twelve is no multiple
    for name, (one, many) in zip(whole._fields, zip(whole, search_range(weight, gram, spec), strict=True), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-8, msg=f"{name} depends on the tiles")


def test_experts_are_searched_each_on_its_own_inputs(generator: torch.Generator) -> None:
    spec = QuantSpec.create("int", 2, group_size=16)
    weight = torch.randn(3, 5, 32, generator=generator)
    grams = torch.stack([gram_of(torch.randn(40, 32, generator=generator), 16) for _ in range(3)])
    together = search_range(weight, grams, spec)
    for expert in range(3):
        alone = search_range(weight[expert], grams[expert], spec)
        assert torch.equal(together.low[expert], alone.low)
        assert torch.equal(together.high[expert], alone.high)


def test_without_inputs_and_without_weights_the_widest_range_stays(weight: Tensor) -> None:
    spec = QuantSpec.create("int", 2, group_size=16)
    found = search_range(weight, torch.zeros(4, 16, 16), spec)
    assert torch.equal(found.low, weight.reshape(OUT, 4, 16).amin(-1))
    zero = search_range(torch.zeros(OUT, IN), torch.eye(16).expand(4, 16, 16), spec)
    assert not zero.low.any()
    assert not zero.error_after.any()


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_ternary_scale_is_the_best_of_those_from_the_mean_outwards(
    group_size: int | Literal["tensor"], weight: Tensor, inputs: Tensor
) -> None:
    spec = QuantSpec.create("ternary", 2, group_size=group_size)
    width = group_width(spec, IN)
    found = search_range(weight, gram_of(inputs, width), spec)
    means = to_groups(weight, group_size).abs().double().mean(-1).float()
    errors = []
    for factor in FACTORS:
        params = get_quantizer(spec.grid).params_from_range(means * (-1 / factor), means * (1 / factor), spec)
        moved = (dequantize(quantize(weight, params, spec), params, spec) - weight).reshape(OUT, -1, width)
        error = output_error(moved, inputs)
        errors.append(error.sum().reshape(1, 1) if group_size == "tensor" else error)
    torch.testing.assert_close(found.error_before.double(), errors[0], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.error_after.double(), torch.stack(errors).amin(0), rtol=1e-4, atol=1e-9)
    assert bool((found.error_after < found.error_before).any())
    assert torch.equal(found.low, -found.high)


def test_ranges_that_do_not_set_the_scale_are_refused(weight: Tensor) -> None:
    gram = torch.eye(16).expand(4, 16, 16)
    ternary = QuantSpec.create("ternary", 2, group_size=16)
    with pytest.raises(ConfigError, match=r"`learn_scale` must be True .* grid='ternary': got learn_scale=False"):
        search_range(weight, gram, ternary, clamp_weight=True)
    for tied in (False, True):
        with pytest.raises(ConfigError, match=r"got grid='r2q', .* Use refine='alternating'"):
            search_range(weight, gram, QuantSpec.create("r2q", 2, group_size=16, tied=tied))


def test_a_scale_that_cannot_be_stored_is_never_chosen() -> None:
    spec = QuantSpec.create("int", 2, group_size=16)
    limit = 3 * torch.finfo(torch.float16).tiny  # min-max is just storable, any shrunk range is not
    weight = torch.full((1, 16), 1e-9)
    weight[0, 0] = limit * 1.001
    found = search_range(weight, torch.eye(16)[None], spec)
    assert found.high.item() == weight[0, 0].item()


def test_the_range_of_weights_that_will_be_clamped_in_bf16_is_bf16(weight: Tensor, inputs: Tensor) -> None:
    spec = QuantSpec.create("int", 2, group_size=16)
    found = search_range(weight.bfloat16(), gram_of(inputs, 16), spec, clamp_weight=True)
    assert torch.equal(found.low, found.low.bfloat16().float())
    assert torch.equal(found.high, found.high.bfloat16().float())
    assert bool((found.low != weight.bfloat16().float().reshape(OUT, 4, 16).amin(-1)).any())


def test_more_candidates_are_no_worse(weight: Tensor, inputs: Tensor) -> None:
    spec = QuantSpec.create("int", 2, group_size=16)
    gram = gram_of(inputs, 16)
    coarse = search_range(weight, gram, spec)
    fine = search_range(weight, gram, spec, factors=[1 - i / 40 for i in range(20)])
    assert bool((fine.error_after <= coarse.error_after * (1 + 1e-5)).all())
    assert float(fine.error_after.sum()) < float(coarse.error_after.sum())
