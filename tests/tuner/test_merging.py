"""Merging bakes exactly the student's weights into the base layers; unmerging and unloading give the teacher back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from bitdistiller_peft import get_bitdistiller_model
from bitdistiller_peft.errors import StateError, UnknownNameError, WeightError
from tests.tiny import CONFIGS, load
from tests.tuner.common import (
    Bases,
    assert_same_tensors,
    config_for,
    copy_state,
    logits,
    overlays,
    picture,
    teacher_logits,
    train,
    trainable,
)

each_architecture = pytest.mark.parametrize("name", CONFIGS)


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Equal bit for bit; GPT-2's own layers add and multiply in another order than ours."""
    if name == "gpt2":
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, expected)


@each_architecture
def test_merging_changes_no_output_and_unmerging_is_exact(name: str, bases: Bases) -> None:
    student = bases.student(name, train_other="norms")
    train(student)
    expected, teacher, before = logits(student), teacher_logits(student), copy_state(student)
    student.merge_adapter()
    assert_same_logits(logits(student), expected, name)
    merged = {key for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
    assert merged == {
        f"base_model.model.{layer_name}.base_layer.{parameter}"
        for layer_name, layer in overlays(student).items()
        for parameter in layer.parameter_names
    }
    student.unmerge_adapter()
    assert_same_tensors(copy_state(student), before)
    assert torch.equal(logits(student), expected)
    assert torch.equal(teacher_logits(student), teacher)


@each_architecture
def test_the_merged_weight_is_the_fake_quantized_one(name: str, bases: Bases) -> None:
    """G33: `Conv1D` stores its weight transposed."""
    student = bases.student(name)
    train(student)
    students = {
        (layer_name, parameter): layer.student(parameter, "default")().detach()
        for layer_name, layer in overlays(student).items()
        for parameter in layer.parameter_names
    }
    merged = student.merge_and_unload()
    for (layer_name, parameter), expected in students.items():
        module = merged.get_submodule(layer_name)
        found = getattr(module, parameter)
        assert torch.equal(found.T if isinstance(module, Conv1D) else found, expected), layer_name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each_architecture
def test_merge_and_unload_gives_a_plain_model_that_equals_the_student(
    name: str, dtype: torch.dtype, bases: Bases, tmp_path: Path
) -> None:
    model = bases.base(name, dtype=dtype)
    types = picture(model)["types"]
    student = get_bitdistiller_model(model, config_for(name, train_other="norms"))
    train(student)
    expected = logits(student)
    merged = student.merge_and_unload()
    assert merged is model
    assert picture(merged)["types"] == types
    assert not hasattr(merged, "peft_config")
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    if dtype == torch.bfloat16 and name == "gpt2":
        torch.testing.assert_close(logits(merged), expected, rtol=2e-2, atol=2e-2)
    else:
        assert_same_logits(logits(merged), expected, name)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(merged))


@each_architecture
def test_unloading_gives_the_original_model_back(name: str, bases: Bases) -> None:
    model = bases.base(name)
    before, types = copy_state(model), picture(model)["types"]
    student = get_bitdistiller_model(model, config_for(name, train_other="norms"))
    train(student)
    plain = student.unload()
    assert plain is model
    assert picture(plain)["types"] == types
    assert_same_tensors(copy_state(plain), before)
    again = get_bitdistiller_model(plain, config_for(name))
    assert torch.equal(logits(again), logits(bases.student(name)))


def test_the_teacher_can_be_asked_while_the_student_is_merged(bases: Bases) -> None:
    """As PEFT's own methods, `disable_adapter()` unmerges."""
    student = bases.student("mixtral")
    train(student)
    expected, teacher = logits(student), teacher_logits(student)
    student.merge_adapter()
    assert torch.equal(teacher_logits(student), teacher)
    assert torch.equal(logits(student), expected)


def test_a_named_adapter_can_be_merged(bases: Bases) -> None:
    student = bases.student("llama")
    train(student)
    student.add_adapter("other", config_for("llama", bits=4))
    student.merge_adapter(["other"])
    assert student.get_model_status().merged_adapters == ["other"]
    assert torch.equal(logits(student), logits(bases.student("llama", bits=4)))
    student.unmerge_adapter()
    merged = student.merge_and_unload(adapter_names=["other"])
    assert torch.equal(logits(merged), logits(bases.student("llama", bits=4)))


def test_a_named_adapter_brings_its_own_norms(bases: Bases) -> None:
    student = bases.student("llama", train_other="norms")
    train(student, lr=0.1)
    student.add_adapter("other", config_for("llama", train_other="norms"))
    merged = student.merge_and_unload(adapter_names=["other"])
    assert torch.equal(logits(merged), logits(bases.student("llama")))


def test_merging_an_unknown_adapter_is_refused(bases: Bases) -> None:
    """PEFT's own methods return the base model without a word."""
    student = bases.student("llama")
    expected = logits(student)
    with pytest.raises(UnknownNameError, match=r"`adapter_names` must be one of.*'defualt'.*Did you mean 'default'"):
        student.merge_and_unload(adapter_names=["defualt"])
    assert torch.equal(logits(student), expected)


def test_unloading_a_merged_student_gives_the_teacher(bases: Bases) -> None:
    student = bases.student("llama", train_other="norms")
    train(student)
    student.merge_adapter()
    assert_same_tensors(copy_state(student.unload()), copy_state(bases.base("llama")))


def test_merging_twice_changes_nothing_and_says_so(bases: Bases) -> None:
    student = bases.student("llama")
    student.merge_adapter()
    expected, state = logits(student), copy_state(student)
    with pytest.warns(UserWarning, match="already merged"):
        student.merge_adapter()
    assert_same_tensors(copy_state(student), state)
    with pytest.warns(UserWarning, match="already merged"):
        merged = student.merge_and_unload()
    assert torch.equal(logits(merged), expected)


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
def test_a_second_adapter_is_not_merged_over_the_first(bases: Bases) -> None:
    student = bases.student("llama")
    student.add_adapter("other", config_for("llama", bits=4))
    student.merge_adapter()
    state = copy_state(student)
    with pytest.raises(StateError, match=r"only one adapter can be merged.*unmerge_adapter\(\)"):
        student.merge_adapter(["other"])
    assert_same_tensors(copy_state(student), state)


def test_two_adapters_at_once_are_not_merged(bases: Bases) -> None:
    student = bases.student("llama")
    student.add_adapter("other", config_for("llama", bits=4))
    state = copy_state(student)
    with pytest.raises(StateError, match=r"only one adapter can be merged: got \['default', 'other'\]"):
        student.merge_adapter(["default", "other"])
    assert_same_tensors(copy_state(student), state)
    assert student.get_model_status().merged_adapters == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_safe_merge_refuses_what_is_not_finite_and_merges_nothing(value: float, bases: Bases) -> None:
    student = bases.student("llama")
    layer = overlays(student)["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        layer.student("weight", "default").weight_scale[3, 1] = value
    teacher = teacher_logits(student)
    with pytest.raises(WeightError, match="must be finite"):
        student.merge_adapter(safe_merge=True)
    student.unmerge_adapter()
    assert torch.equal(teacher_logits(student), teacher)
    clean = bases.student("llama")
    train(clean)
    expected = logits(clean)
    assert torch.equal(logits(clean.merge_and_unload(safe_merge=True)), expected)


def test_an_adapter_is_not_deleted_while_it_is_merged(bases: Bases) -> None:
    student = bases.student("llama")
    student.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        student.delete_adapter("default")


def test_switching_the_adapter_unmerges(bases: Bases) -> None:
    student = bases.student("llama")
    student.add_adapter("other", config_for("llama", bits=4))
    teacher = teacher_logits(student)
    student.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        student.set_adapter("other")
    assert torch.equal(logits(student), logits(bases.student("llama", bits=4)))
    assert torch.equal(teacher_logits(student), teacher)


def test_a_merged_student_that_is_moved_unmerges_in_its_new_dtype(bases: Bases) -> None:
    student = bases.student("llama")
    student.merge_adapter()
    student.to(torch.bfloat16)
    student.unmerge_adapter()
    assert torch.equal(teacher_logits(student), logits(bases.base("llama").to(torch.bfloat16)))


def test_training_after_unmerging_goes_on_as_if_nothing_had_happened(bases: Bases) -> None:
    one, two = bases.student("llama"), bases.student("llama")
    train(one)
    train(two)
    one.merge_adapter()
    one.unmerge_adapter()
    assert set(trainable(one)) == set(trainable(two))
    train(one)
    train(two)
    assert torch.equal(logits(one), logits(two))
