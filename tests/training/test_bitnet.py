"""BitNet Distillation from end to end on the decoders it names: surgery, all parts of the loss, packing, reload."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitdistiller_peft.layers import PackedLinear, SubLN
from tests import tiny
from tests.training import helpers

STUDENT = {"grid": "ternary", "group_size": "tensor", "gradient": "ste", "learn_scale": False, "activation_bits": 8}
STAGE_2 = {"loss_type": "ce", "gamma": "estimate", "learning_rate": 0.1}
STAGE_3 = {
    "loss_type": "forward_kl",
    "gamma": "estimate",  # no cakld part: not used
    "ce_weight": 1.0,
    "logits_weight": 10.0,
    "temperature": 5.0,
    "rescale_temperature": False,
    "attention_weight": 1e3,
    "attention_split_heads": 8,
    "learning_rate": 0.1,
    "max_grad_norm": 1.0,
}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=tiny.token_ids()).logits


@pytest.mark.parametrize(
    ("name", "subln", "packing"),
    [
        ("llama", "output", "bitstream"),
        ("qwen2", "all", "base3"),
        ("qwen3", "output", "base3"),
        ("gemma3", "all", "bitstream"),
        ("gemma3", "none", "base3"),
    ],
    ids=lambda value: value,
)
def test_all_stages_leave_a_packed_model_that_reloads_equal(
    name: str, subln: str, packing: str, bases: Path, tmp_path: Path
) -> None:
    teacher = helpers.base(bases, name, seed=1)
    expected = logits(teacher)
    model = helpers.student(bases, name, **STUDENT, subln=subln, packing=packing)
    per_layer = {"output": 2, "all": 7, "none": 0}[subln]
    assert sum(isinstance(module, SubLN) for module in model.modules()) == 2 * per_layer

    helpers.trainer(model, tmp_path / "2", **STAGE_2).train()
    before = helpers.weights(model)
    run = helpers.trainer(model, tmp_path / "3", teacher=teacher, **STAGE_3)
    run.train()
    for part in ("ce", "forward_kl", "attention_relation"):
        assert all(0 < value < float("inf") for value in helpers.history(run, part))
    after = helpers.weights(model)
    assert all(bool((after[key] != start).any()) for key, start in before.items()), "something was not trained"
    assert torch.equal(logits(teacher), expected)

    trained = logits(model)
    packed = model.pack_and_unload(progressbar=False)
    assert type(packed).__module__.startswith("transformers.models.")
    assert torch.equal(logits(packed), trained)
    packed.save_pretrained(tmp_path / "packed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(loaded), trained)
    layers = [module for module in loaded.modules() if isinstance(module, PackedLinear)]
    assert len(layers) == 14
    assert {(layer.activation_bits, layer.spec.packing) for layer in layers} == {(8, packing)}
    gains = [module.weight for module in loaded.modules() if isinstance(module, SubLN)]
    assert len(gains) == 2 * per_layer
    assert all(bool((gain != 1).any()) for gain in gains)
