"""A teacher is the full-precision model, says the same wherever it lives, and leaves nothing changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.training import SelfTeacher
from bitdistiller_peft.training.forward import add_distill_forward, logits_of
from bitdistiller_peft.tuner import full_precision
from tests import tiny
from tests.training import helpers


def test_the_self_teacher_equals_a_separate_copy(bases: Path, tmp_path: Path) -> None:
    own = helpers.trainer(helpers.student(bases), tmp_path / "a", gamma="estimate")
    other = helpers.trainer(helpers.student(bases), tmp_path / "b", gamma="estimate", teacher=helpers.base(bases))
    own.train()
    other.train()
    assert own.gamma == other.gamma
    assert helpers.history(own) == helpers.history(other)
    assert helpers.difference(helpers.weights(own.model), helpers.weights(other.model)) == 0


def test_a_teacher_may_be_a_path(bases: Path, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    helpers.base(bases, seed=1).save_pretrained(folder)
    loaded = helpers.trainer(helpers.student(bases), tmp_path / "a", teacher=str(folder))
    given = helpers.trainer(helpers.student(bases), tmp_path / "b", teacher=helpers.base(bases, seed=1))
    loaded.train()
    given.train()
    assert helpers.history(loaded) == helpers.history(given)


def test_the_self_teacher_says_exactly_what_the_original_model_says(bases: Path) -> None:
    model = helpers.student(bases)
    tokens = tiny.token_ids()
    expected = helpers.base(bases)(input_ids=tokens).logits
    add_distill_forward(model.get_base_model())
    states = SelfTeacher(model)({"input_ids": tokens})
    assert torch.equal(logits_of(states).view_as(expected), expected)
    assert not states.hidden.requires_grad


def test_borrowing_the_teacher_gives_everything_back(bases: Path) -> None:
    model = helpers.student(bases, train_other="norms")
    model.train()
    asleep = next(module for module in model.modules() if type(module).__name__ == "LlamaMLP")
    asleep.eval()
    for kind in ("bitdistiller_weight", "modules_to_save"):
        next(p for name, p in model.named_parameters() if kind in name).requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    layer = next(module for module in model.modules() if hasattr(module, "active_student"))
    with full_precision(model):
        assert not model.training
        assert layer.active_student("weight") is None
        assert not torch.is_grad_enabled()
    assert layer.active_student("weight") is not None
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert modes == [module.training for module in model.modules()]


def test_the_teacher_is_given_back_also_after_an_error(bases: Path) -> None:
    model = helpers.student(bases).train()
    before = helpers.weights(model).keys()
    with pytest.raises(RuntimeError, match="broken"), full_precision(model):
        raise RuntimeError("broken")
    assert model.training
    assert helpers.weights(model).keys() == before


def test_the_teacher_is_lent_with_or_without_peft_around_it_and_other_adapters_stay(bases: Path) -> None:
    tokens = tiny.token_ids()
    exact = helpers.base(bases)(input_ids=tokens).logits
    student = helpers.student(bases, train_other="norms")
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)
    for model in (student, student.get_base_model()):
        assert not torch.equal(model(input_ids=tokens).logits, exact)
        with full_precision(model):
            assert torch.equal(model(input_ids=tokens).logits, exact)
    lora = LoraConfig(modules_to_save=["norm"], init_lora_weights=False, target_modules=["q_proj"])
    teacher = get_peft_model(helpers.base(bases), lora).eval()
    tuned = teacher(input_ids=tokens).logits
    assert not torch.equal(tuned, exact)
    with full_precision(teacher):
        assert torch.equal(teacher(input_ids=tokens).logits, tuned)


@pytest.mark.parametrize("kind", ["self", "separate"])
def test_no_teacher_drops_anything_out(bases: Path, tmp_path: Path, kind: str) -> None:
    def with_dropout(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        return model

    student = with_dropout(helpers.student(bases))
    teacher = "self" if kind == "self" else with_dropout(helpers.base(bases)).train()
    run = helpers.trainer(student, tmp_path, teacher=teacher)
    student.train()
    if kind == "separate":
        run.teacher.model.train()  # by whoever: it must not matter
    inputs = helpers.batch(helpers.dataset(4))
    first, second = (run.teacher({k: v for k, v in inputs.items() if k != "labels"}) for _ in range(2))
    assert torch.equal(first.hidden, second.hidden)
    assert student.training


def test_neither_side_keeps_a_cache(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, teacher=helpers.base(bases))
    seen: list[object] = []
    for backbone in (run.model.get_base_model().model, run.teacher.model.model):
        backbone.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["use_cache"]), with_kwargs=True)
    run.train()
    assert seen == [False] * 4


def test_a_teacher_of_another_vocabulary_is_refused_with_both_sizes(bases: Path, tmp_path: Path) -> None:
    other = helpers.base(bases)
    other.resize_token_embeddings(tiny.VOCAB + 8)
    with pytest.raises(ConfigError, match=r"104 tokens for the teacher and 96 for the student"):
        helpers.trainer(helpers.student(bases), tmp_path, teacher=other)


def test_the_student_cannot_be_its_own_separate_teacher(bases: Path, tmp_path: Path) -> None:
    model = helpers.student(bases)
    with pytest.raises(ConfigError, match="teacher='self'"):
        helpers.trainer(model, tmp_path, teacher=model)


def test_self_is_refused_where_base_weights_train_in_place(bases: Path, tmp_path: Path) -> None:
    model = helpers.student(bases)
    model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight"):
        helpers.trainer(model, tmp_path)


def test_trained_copies_of_other_modules_do_not_reach_the_teacher(bases: Path, tmp_path: Path) -> None:
    model = helpers.student(bases, train_other="all")
    run = helpers.trainer(model, tmp_path)
    inputs = {"input_ids": tiny.token_ids()}
    before = logits_of(run.teacher(inputs))
    head = helpers.weights(model)["base_model.model.lm_head.modules_to_save.default.weight"]
    run.train()
    after = helpers.weights(model)["base_model.model.lm_head.modules_to_save.default.weight"]
    assert not torch.equal(head, after)
    assert torch.equal(before, logits_of(run.teacher(inputs)))


def test_cross_entropy_alone_asks_no_teacher(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, loss_type="ce", gamma="estimate")
    run.train()
    assert run.teacher is None
    assert helpers.history(run) == pytest.approx(helpers.history(run, "ce"))
    assert run.gamma is None
