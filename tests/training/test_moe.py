"""Mixture-of-experts models, end to end: fused experts are calibrated, trained, packed, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bitdistiller_peft.calibration import calibrate
from bitdistiller_peft.layers import PackedExperts, quant_specs
from tests import tiny
from tests.training import helpers


@pytest.mark.parametrize("name", tiny.MOE)
def test_experts_are_calibrated_trained_and_packed(name: str, bases: Path, tmp_path: Path) -> None:
    model = helpers.student(bases, name)
    calibrate(model, None, tiny.token_ids(batch=4, length=24), show_progress=False)
    experts = [
        n for n, _ in model.named_parameters() if "experts" in n and "bitdistiller" in n and n.endswith("weight")
    ]
    assert len(experts) == 2 * 2  # two parameters in each of two layers
    before = helpers.weights(model)
    run = helpers.trainer(model, tmp_path / "run", learning_rate=0.05)
    run.train()
    after = helpers.weights(run.model)
    assert all(not torch.equal(before[n], after[n]) for n in experts)
    model.eval()
    with torch.no_grad():
        trained = model(tiny.token_ids()).logits
        packed = model.pack_and_unload(progressbar=False)
        assert torch.equal(packed(tiny.token_ids()).logits, trained)
        packed.save_pretrained(tmp_path / "packed")
        reloaded = tiny.load(tmp_path / "packed")
        assert torch.equal(reloaded(tiny.token_ids()).logits, trained)
    fused = [module for module in reloaded.modules() if isinstance(module, PackedExperts)]
    assert [sorted(quant_specs(module)) for module in fused] == [["down_proj", "gate_up_proj"]] * 2
