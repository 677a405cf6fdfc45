"""AFPQ's grids go through clip search, GPTQ and AWQ; groups without a positive or a negative weight like all others."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from bitdistiller_peft import BitDistillerConfig, calibrate, get_bitdistiller_model
from bitdistiller_peft.calibration import GptqOptions
from bitdistiller_peft.calibration.clip import FACTORS, search_range
from bitdistiller_peft.calibration.gptq import compensate
from bitdistiller_peft.calibration.slots import find_student
from bitdistiller_peft.quantizers import QuantSpec, dequantize, fake_quantize, quantize, to_groups
from tests.calibration.derivation import check_codes, correlated, gram_of
from tests.calibration.models import IDS
from tests.hub.models import assert_same_state
from tests.reference import clip_search
from tests.tiny import load, save_base

GRIDS = [
    (grid + kind, bits)
    for grid, widths in (("nf", (2, 3, 4)), ("fp", (3, 4)))
    for kind in ("", "_sym")
    for bits in widths
]
METHODS = ("clip", "gptq", "awq")
WIDTH, TOKENS = 256, 300

each_grid = pytest.mark.parametrize(("grid", "bits"), GRIDS, ids=lambda value: str(value))
each_size = pytest.mark.parametrize("group_size", [32, 64, 128, -1])
SLOW = [pytest.param(size, marks=pytest.mark.slow) for size in (64, 128)]
each_size_if_slow = pytest.mark.parametrize("group_size", [32, -1, *SLOW])


def one_signed(weight: Tensor, width: int = 32) -> Tensor:
    """The weight, in place, with one group each without negative, positive, and any weights; the last row positive."""
    weight[0, :width].abs_()
    weight[1, :width].abs_().neg_()
    weight[2, :width] = 0
    weight[-1].abs_()
    return weight


@pytest.fixture
def weight(generator: torch.Generator) -> Tensor:
    return one_signed(0.1 * torch.randn(8, WIDTH, generator=generator), 128)


@pytest.fixture
def inputs(generator: torch.Generator) -> Tensor:
    return correlated(generator, WIDTH, TOKENS)


@each_size
@each_grid
def test_a_one_signed_group_is_rounded_like_all_others(grid: str, bits: int, group_size: int, weight: Tensor) -> None:
    """No group notices what signs the others have; the released code gives back the whole matrix as it is."""
    spec = QuantSpec.create(grid, bits, group_size=group_size)
    values = to_groups(fake_quantize(weight, spec), group_size)
    alone = torch.cat(
        [fake_quantize(row, QuantSpec.create(grid, bits, group_size=-1)) for row in rows_of(weight, spec)]
    )
    assert torch.equal(values.reshape(alone.shape), alone)
    moved = (values - to_groups(weight, group_size)).square().sum(-1)
    energy = to_groups(weight, group_size).square().sum(-1)
    assert bool((moved[energy > 0] > 0).all()), "a group was left as it is"
    assert bool((moved <= 0.95 * energy).all()), "a group was lost"
    if grid.startswith("fp"):  # whose levels are mirror images
        torch.testing.assert_close(fake_quantize(-weight, spec), -fake_quantize(weight, spec), rtol=0, atol=0.0)


def rows_of(weight: Tensor, spec: QuantSpec) -> list[Tensor]:
    groups = to_groups(weight, spec.group_size)
    return list(groups.reshape(-1, 1, groups.shape[-1]))


@each_size_if_slow
@each_grid
def test_the_clip_search_finds_the_range_of_one_signed_groups(
    grid: str, bits: int, group_size: int, weight: Tensor, inputs: Tensor
) -> None:
    spec = QuantSpec.create(grid, bits, group_size=group_size)
    width = WIDTH if group_size == -1 else group_size
    cut = inputs.reshape(TOKENS, -1, width).transpose(0, 1)
    gram = (cut.transpose(1, 2).double() @ cut.double() / TOKENS).float()
    found = search_range(weight, gram, spec)
    low, high, error = clip_search.search(weight, inputs, spec, FACTORS, clamp_weight=False)
    torch.testing.assert_close(found.error_after.double(), error, rtol=1e-3, atol=1e-9)
    chosen = (found.low == low) & (found.high == high)
    assert chosen.float().mean() > 0.95  # the others are ties
    assert bool((found.low[-1] == 0).all())


@each_size_if_slow
@each_grid
def test_gptq_chooses_the_codes_of_its_derivation_also_where_a_sign_is_missing(
    grid: str, bits: int, group_size: int, weight: Tensor, inputs: Tensor
) -> None:
    # scales in fp32: the smallest is where an absent sign's begins
    spec = QuantSpec.create(grid, bits, group_size=group_size, scale_dtype="float32")
    options = GptqOptions(clip_search=False, block_size=100)
    found = check_codes(weight, inputs, spec, options)
    codes = quantize(found.weight, found.params, spec)
    assert torch.equal(dequantize(codes, found.params, spec), found.values)
    assert bool((found.error_after <= found.error_before).all())
    assert bool((found.error_after[:-1] < found.error_before[:-1]).any())


@each_grid
def test_gptq_with_a_clip_search_errs_less_than_rounding_on_every_channel(
    grid: str, bits: int, weight: Tensor, inputs: Tensor
) -> None:
    spec = QuantSpec.create(grid, bits, group_size=64)
    found = compensate(weight, gram_of(inputs), spec, GptqOptions())
    plain = ((fake_quantize(weight, spec) - weight).double() @ inputs.double().T).square().mean(-1)
    after = ((found.values - weight).double() @ inputs.double().T).square().mean(-1)
    assert bool((after <= plain * (1 + 1e-3)).all())
    assert after.sum() < 0.8 * plain.sum()


# ------------------------------------------------------------------------------------------------ whole models


def student(folder: Path, grid: str, bits: int, group_size: int) -> PeftModel:
    base = load(save_base("llama", folder))
    for name, parameter in base.named_parameters():
        if name.endswith("proj.weight"):
            one_signed(parameter.data)
    config = BitDistillerConfig(grid=grid, bits=bits, group_size=group_size, train_other="norms")
    return get_bitdistiller_model(base, config)


def check(grid: str, bits: int, group_size: int, method: str, folder: Path, models: Path) -> None:
    model = student(models, grid, bits, group_size)
    _, slots = find_student(model)
    options: dict[str, Any] = {"awq": {"alphas": (0.0, 0.5)}}.get(method, {})
    result = calibrate(model, None, IDS, method=method, batch_size=6, show_progress=False, **options)
    before, after = (sum(getattr(report, name) for report in result.layers) for name in ("error_before", "error_after"))
    assert after < before
    for slot in slots:
        values, weight = (to_groups(tensor, slot.spec.group_size) for tensor in (slot.student().detach(), slot.weight))
        moved, energy = (tensor.square().sum(-1) for tensor in (values - weight, weight))
        assert bool((moved[energy > 0] > 0).all()), f"{slot.name}: a group was left as it is"
        assert bool((moved <= 0.8 * energy).all()), f"{slot.name}: a group was lost"
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
        packed = model.pack_and_unload(progressbar=False)
        assert torch.equal(packed(input_ids=IDS).logits, trained)
        packed.save_pretrained(folder)
        loaded = load(folder)
        assert_same_state(loaded, packed)
        assert torch.equal(loaded(input_ids=IDS).logits, trained)


SETTINGS = list(itertools.product((32, 64, -1), METHODS))


@pytest.mark.parametrize(
    ("grid", "bits", "group_size", "method"),
    [(*kind, *SETTINGS[(2 * number) % len(SETTINGS)]) for number, kind in enumerate(GRIDS)],
)
def test_a_calibrated_model_is_packed_saved_and_loaded(
    grid: str, bits: int, group_size: int, method: str, models: Path, tmp_path: Path
) -> None:
    check(grid, bits, group_size, method, tmp_path, models)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group_size", [32, 64, -1])
@each_grid
def test_every_calibrated_model_is_packed_saved_and_loaded(
    grid: str, bits: int, group_size: int, method: str, models: Path, tmp_path: Path
) -> None:
    check(grid, bits, group_size, method, tmp_path, models)
