"""Rotations and Sinkhorn-like scales: nothing changes in full precision, and they are found on every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitdistiller_peft.calibration import calibrate
from bitdistiller_peft.calibration.awq import AwqSweep, column_spread
from bitdistiller_peft.calibration.rotation import random_rotation
from bitdistiller_peft.calibration.slots import Display, find_student
from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.tuner import full_precision
from tests.calibration.models import IDS, student


@torch.no_grad()
def latent_logits(model: nn.Module) -> Tensor:
    """The logits with master weights that are not rounded."""
    base, slots = find_student(model)
    with Display() as display:
        for slot in slots:
            display.show(slot, slot.weight)
        return base(input_ids=IDS).logits


@pytest.mark.parametrize("width", [16, 64, 24])
def test_a_rotation_is_orthogonal(width: int) -> None:
    matrix = random_rotation(width, 0)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width), rtol=0, atol=1e-5)
    assert matrix.abs().max() < 0.9


# heads that share values (llama), wider than the model (qwen3-moe), and norms between blocks (gemma3)
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_heads_are_rotated_and_nothing_changes_in_full_precision(name: str, models: Path) -> None:
    model = student(models, name)
    before, old = latent_logits(model), {slot.name: slot.weight.clone() for slot in find_student(model)[1]}
    result = calibrate(model, None, IDS, method="awq", rotate_heads=True, alphas=(0.0,), show_progress=False)
    torch.testing.assert_close(latent_logits(model), before, rtol=1e-3, atol=1e-4)
    base, slots = find_student(model)
    turned = {slot.layer_name.rpartition(".")[2] for slot in slots if not torch.equal(slot.weight, old[slot.name])}
    assert turned == {"v_proj", "o_proj"}
    assert sum("rotated head by head" in report.note for report in result.layers) == 4
    with torch.no_grad(), full_precision(base):
        torch.testing.assert_close(base(input_ids=IDS).logits, before)  # the teacher


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_layers_with_biases_or_fused_projections_are_left_alone(name: str, models: Path) -> None:
    model = student(models, name)
    result = calibrate(model, None, IDS, method="awq", rotate_heads=True, alphas=(0.0,), show_progress=False)
    assert not any("rotated" in report.note for report in result.layers)


def test_skipped_layers_are_not_rotated(models: Path) -> None:
    model = student(models)
    result = calibrate(model, None, IDS, method="awq", rotate_heads=True, skip=("v_proj",), show_progress=False)
    assert not any("rotated" in report.note for report in result.layers)


def test_an_interrupted_rotation_is_taken_back(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = student(models)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AwqSweep, "_apply_scalings", stop)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, None, IDS, method="awq", rotate_heads=True, show_progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_balanced_columns_spread_alike(generator: torch.Generator) -> None:
    uneven = torch.randn(96, 64, generator=generator) * torch.logspace(-2, 2, 64) * torch.logspace(1, -1, 96)[:, None]
    balanced = uneven / column_spread([uneven[:32], uneven[32:]])
    rows = balanced / balanced.std(1, keepdim=True)
    assert float(rows.std(0).max() / rows.std(0).min()) < 1.01
    assert float(uneven.std(0).max() / uneven.std(0).min()) > 1000
    assert bool(torch.isfinite(column_spread([torch.zeros(4, 8)])).all())


def test_sinkhorn_scales_are_folded_and_no_worse_than_none(models: Path) -> None:
    model = student(models, train_other="norms")
    uneven = torch.logspace(-1, 1, 64)
    _, slots = find_student(model)
    with torch.no_grad():
        for slot in slots:
            if slot.weight.shape[1] == 64 and "o_proj" not in slot.name:
                slot.student.weight.mul_(uneven)
    before = latent_logits(model)
    result = calibrate(model, None, IDS, method="awq", scales="sinkhorn", show_progress=False)
    torch.testing.assert_close(latent_logits(model), before, rtol=1e-3, atol=1e-3)
    scaled = [report for report in result.layers if "alpha=" in report.note and "taken back" in report.note]
    assert scaled
    assert all(report.error_after <= report.error_before for report in scaled)


def test_unknown_scales_and_flags_are_refused(models: Path) -> None:
    model = student(models)
    with pytest.raises(UnknownNameError, match="scales"):
        calibrate(model, None, IDS, method="awq", scales="sinkhorm", show_progress=False)
    with pytest.raises(ConfigError, match="rotate_heads"):
        calibrate(model, None, IDS, method="awq", rotate_heads=1, show_progress=False)
