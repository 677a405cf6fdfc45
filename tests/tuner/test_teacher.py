"""`disable_adapter()` is the full-precision teacher, exactly, whenever it is called, and costs the student nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from bitdistiller_peft import get_bitdistiller_model
from tests.tiny import CONFIGS
from tests.tuner.common import (
    Bases,
    assert_same_tensors,
    config_for,
    copy_state,
    gradients,
    logits,
    loss_of,
    run,
    teacher_logits,
    train,
    trainable,
    without_dropout,
)

each_architecture = pytest.mark.parametrize("name", CONFIGS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each_architecture
def test_the_teacher_is_exact_before_and_after_training(name: str, dtype: torch.dtype, bases: Bases) -> None:
    expected = logits(bases.base(name, dtype=dtype))
    student = get_bitdistiller_model(bases.base(name, dtype=dtype), config_for(name))
    at_first = logits(student)
    assert torch.equal(teacher_logits(student), expected)
    train(student)
    assert torch.equal(teacher_logits(student), expected)
    assert not torch.equal(logits(student), at_first)
    assert not torch.equal(logits(student), expected)


@pytest.mark.parametrize("train_other", ["norms", "all"])
def test_the_teacher_has_its_own_norms_embeddings_and_head(train_other: str, bases: Bases) -> None:
    """G7: what `train_other` trains are copies."""
    expected = logits(bases.base("llama"))
    student = bases.student("llama", train_other=train_other)
    train(student, lr=0.1)
    assert torch.equal(teacher_logits(student), expected)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("with_graph", [False, True], ids=["no-grad", "with-graph"])
@each_architecture
def test_a_teacher_pass_between_forward_and_backward_changes_no_gradient(
    name: str, with_graph: bool, checkpointing: bool, bases: Bases
) -> None:
    """G14: also where the student's activations are recomputed after the teacher has run."""
    student = without_dropout(bases.student(name, train_other="norms")).train()
    if checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    expected = gradients(student)
    loss = loss_of(student)
    with student.disable_adapter(), torch.set_grad_enabled(with_graph):
        run(student)
    loss.backward()
    assert_same_tensors({k: p.grad for k, p in student.named_parameters() if p.grad is not None}, expected)


def test_student_and_teacher_in_one_loss_train_the_student_only(bases: Bases) -> None:
    student = bases.student("llama")
    with student.disable_adapter():
        teacher = run(student)
    (run(student) - teacher).square().sum().backward()
    with_gradient = {key for key, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_gradient == set(trainable(student))


def test_contexts_nest_and_an_error_inside_brings_the_student_back(bases: Bases) -> None:
    student = bases.student("llama")
    teacher, expected = teacher_logits(student), logits(student)
    with student.disable_adapter():
        with student.disable_adapter():
            assert torch.equal(logits(student), teacher)
        assert torch.equal(logits(student), teacher), "the inner context switched the student on"
    with pytest.raises(ZeroDivisionError), student.disable_adapter():
        raise ZeroDivisionError
    assert torch.equal(logits(student), expected)


def test_layers_switch_without_a_context(bases: Bases) -> None:
    student = bases.student("mixtral")
    teacher, expected = teacher_logits(student), logits(student)
    student.disable_adapter_layers()
    assert torch.equal(logits(student), teacher)
    student.enable_adapter_layers()
    assert torch.equal(logits(student), expected)


def test_transformers_own_switch_works(bases: Bases, tmp_path: Path) -> None:
    student = bases.student("llama")
    train(student)
    student.save_pretrained(tmp_path)
    model = bases.base("llama")
    teacher = logits(model)
    model.load_adapter(str(tmp_path))
    assert torch.equal(logits(model.eval()), logits(student))
    model.disable_adapters()
    assert torch.equal(logits(model), teacher)
    model.enable_adapters()
    assert torch.equal(logits(model), logits(student))


def test_a_look_at_the_teacher_leaves_what_is_trainable_as_it_was(bases: Bases) -> None:
    """G14: PEFT's own switch makes every active adapter trainable when it is switched on again."""
    student = bases.student("llama")
    student.add_adapter("other", config_for("llama"))
    student.set_requires_grad("default", False)
    before = set(trainable(student))
    teacher_logits(student)
    assert set(trainable(student)) == before == set()


def test_a_frozen_adapter_stays_frozen_when_the_teacher_is_asked(bases: Bases, tmp_path: Path) -> None:
    """G14, G15."""
    bases.student("llama").save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bases.base("llama"), tmp_path)
    teacher_logits(loaded)
    assert not trainable(loaded)


def test_no_state_is_left_behind_by_the_teacher(bases: Bases) -> None:
    student = bases.student("gpt2", train_other="norms")
    before, names = copy_state(student), set(trainable(student))
    teacher_logits(student)
    assert_same_tensors(copy_state(student), before)
    assert set(trainable(student)) == names
