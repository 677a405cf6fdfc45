"""The loss computes with the head that is in force: quantized, packed, a trained copy, or plain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.training.heads import output_head
from tests import tiny
from tests.training import helpers

QUANTIZED_HEAD = {"target_modules": ["q_proj", "lm_head"]}


def test_a_quantized_head_is_honoured_and_trained(bases: Path, tmp_path: Path) -> None:
    model = helpers.student(bases, **QUANTIZED_HEAD)
    rows = helpers.dataset(4)
    total, count = helpers.textbook_loss(model, helpers.batch(rows), gamma=0.4)
    run = helpers.trainer(model, tmp_path, data=rows, max_steps=1)
    before = helpers.weights(model)
    run.train()
    assert helpers.history(run)[0] == pytest.approx(total / count, rel=1e-5)
    moved = [name for name, value in helpers.weights(model).items() if not torch.equal(value, before[name])]
    assert "base_model.model.lm_head.bitdistiller_weight.default.weight" in moved


def test_the_self_teacher_speaks_with_the_unquantized_head(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases, **QUANTIZED_HEAD), tmp_path)
    states = run.teacher({"input_ids": tiny.token_ids()})
    assert torch.equal(states.head.weight, helpers.base(bases).lm_head.weight)


def test_a_trained_copy_of_the_head_is_the_students_and_not_the_teachers(bases: Path) -> None:
    model = helpers.student(bases, train_other="all")
    wrapper = model.get_base_model().lm_head
    copy = wrapper.modules_to_save["default"]
    copy.weight.data += 1
    base = model.get_base_model()
    assert output_head(base).weight is copy.weight
    with model.disable_adapter():
        assert output_head(base).weight is wrapper.original_module.weight


def test_a_packed_teacher_speaks_with_its_packed_head(bases: Path) -> None:
    model = get_bitdistiller_model(helpers.base(bases), BitDistillerConfig(bits=2, group_size=32, **QUANTIZED_HEAD))
    expected = output_head(model.get_base_model()).weight
    packed = model.pack_and_unload(progressbar=False)
    assert torch.equal(output_head(packed).weight, expected)


def test_packing_after_training_gives_the_students_logits(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, learning_rate=0.1)
    run.train()
    student = run.model.eval()
    tokens = tiny.token_ids()
    with torch.no_grad():
        expected = student(input_ids=tokens).logits
        packed: nn.Module = student.pack_and_unload(progressbar=False).eval()
        assert torch.equal(packed(input_ids=tokens).logits, expected)
    packed.save_pretrained(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(tiny.load(tmp_path / "packed")(input_ids=tokens).logits, expected)


def test_training_leaves_the_models_config_as_it_was(bases: Path, tmp_path: Path) -> None:
    model = helpers.student(bases, "mixtral")
    names = ("use_cache", "output_router_logits", "router_aux_loss_coef")
    before = {name: getattr(model.config, name) for name in names}
    helpers.trainer(model, tmp_path, max_steps=1).train()
    assert {name: getattr(model.config, name) for name in names} == before
