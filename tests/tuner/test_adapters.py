"""Several students over one base model are added, chosen, trained, saved, loaded and deleted apart from each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from bitdistiller_peft import BitDistillerConfig
from tests.tiny import CONFIGS
from tests.tuner.common import (
    Bases,
    assert_same_tensors,
    config_for,
    copy_state,
    logits,
    overlays,
    teacher_logits,
    train,
    trainable,
)

each_architecture = pytest.mark.parametrize("name", CONFIGS)


def chosen(student: PeftModel, adapter: str) -> torch.Tensor:
    """The logits of one of the adapters."""
    student.set_adapter(adapter)
    return logits(student)


@each_architecture
def test_two_adapters_train_apart(name: str, bases: Bases) -> None:
    student = bases.student(name)
    teacher = teacher_logits(student)
    train(student)
    first = logits(student)
    student.add_adapter("other", config_for(name, bits=4))
    assert student.active_adapters == ["default"]
    assert not [key for key in trainable(student) if ".other." in key], "a new adapter is not active"
    assert torch.equal(logits(student), first)

    student.set_adapter("other")
    assert student.active_adapters == ["other"]
    assert all(".other." in key for key in trainable(student))
    before = copy_state(student)
    train(student)
    changed = {key for key, value in student.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(trainable(student))
    second = logits(student)
    assert not torch.equal(second, first)

    assert torch.equal(chosen(student, "default"), first)
    assert torch.equal(chosen(student, "other"), second)
    assert torch.equal(teacher_logits(student), teacher)


@each_architecture
def test_two_adapters_are_saved_and_loaded(name: str, bases: Bases, tmp_path: Path) -> None:
    student = bases.student(name, train_other="norms")
    train(student)
    student.add_adapter("other", config_for(name, grid="nf", scale_dtype="float32", train_other="norms"))
    student.set_adapter("other")
    train(student)
    student.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    assert (tmp_path / "other" / "adapter_model.safetensors").exists()

    loaded = PeftModel.from_pretrained(bases.base(name), tmp_path)
    loaded.load_adapter(tmp_path / "other", adapter_name="other")
    for adapter in ("default", "other"):
        assert torch.equal(chosen(loaded, adapter), chosen(student, adapter))
    alone = PeftModel.from_pretrained(bases.base(name), tmp_path / "other")
    assert torch.equal(logits(alone), chosen(student, "other"))


def test_only_the_chosen_adapters_are_saved(bases: Bases, tmp_path: Path) -> None:
    student = bases.student("llama")
    student.add_adapter("other", config_for("llama"))
    student.save_pretrained(tmp_path, selected_adapters=["other"])
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["other"]
    assert not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")  # transformers' own way to add one
def test_both_adapters_load_through_transformers(bases: Bases, tmp_path: Path) -> None:
    student = bases.student("llama")
    train(student)
    student.add_adapter("other", config_for("llama", bits=3))
    student.save_pretrained(tmp_path)
    model = bases.base("llama")
    model.load_adapter(str(tmp_path), adapter_name="one")
    model.load_adapter(str(tmp_path / "other"), adapter_name="two")
    assert torch.equal(logits(model.eval()), chosen(student, "other"))
    model.set_adapter("one")
    assert torch.equal(logits(model), chosen(student, "default"))


def test_an_adapter_can_be_added_after_loading(bases: Bases, tmp_path: Path) -> None:
    bases.student("mixtral").save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bases.base("mixtral"), tmp_path)
    expected = logits(loaded)
    loaded.add_adapter("new", config_for("mixtral", bits=4))
    assert torch.equal(logits(loaded), expected)
    assert not trainable(loaded), "adding an adapter must not unfreeze another one"
    loaded.set_adapter("new")
    assert all(".new." in key for key in trainable(loaded))
    fresh = bases.student("mixtral", bits=4)
    assert torch.equal(logits(loaded), logits(fresh))
    train(loaded)
    train(fresh)
    assert torch.equal(logits(loaded), logits(fresh))


@pytest.mark.parametrize("adapter_name", ["student", "weight", "layers"])
def test_adapter_names_do_not_matter(adapter_name: str, bases: Bases, tmp_path: Path) -> None:
    """Names that also occur in the model's own module names included."""
    student = get_peft_model(bases.base("llama"), config_for("llama"), adapter_name=adapter_name)
    train(student)
    student.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bases.base("llama"), tmp_path / adapter_name)
    assert torch.equal(logits(loaded), logits(student))


def test_a_name_inside_the_prefix_brings_pefts_warning(bases: Bases) -> None:
    student = bases.student("llama")
    with pytest.warns(UserWarning, match="should not be contained in the prefix"):
        student.add_adapter("bit", config_for("llama"))


def test_an_adapter_on_other_layers_leaves_the_rest_to_the_teacher(bases: Bases) -> None:
    student = bases.student("llama", layers_to_transform=[0])
    student.add_adapter("other", config_for("llama", layers_to_transform=[1]))
    student.set_adapter("other")
    alone = bases.student("llama", layers_to_transform=[1])
    assert torch.equal(logits(student), logits(alone))
    student.set_adapter("default")
    assert torch.equal(logits(student), logits(bases.student("llama", layers_to_transform=[0])))


def test_a_second_adapter_starts_from_the_teacher_not_from_the_first(bases: Bases) -> None:
    student = bases.student("gpt2")
    train(student)
    student.add_adapter("other", config_for("gpt2"))
    assert torch.equal(chosen(student, "other"), logits(bases.student("gpt2")))


def test_an_adapter_added_while_another_is_merged_starts_from_the_teacher_too(bases: Bases) -> None:
    student = bases.student("gpt2")
    train(student)
    student.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        student.add_adapter("other", config_for("gpt2"))
    assert torch.equal(chosen(student, "other"), logits(bases.student("gpt2")))


def test_switching_back_and_forth_freezes_the_adapter_that_rests(bases: Bases) -> None:
    student = bases.student("llama", train_other="norms")
    student.add_adapter("other", config_for("llama", train_other="norms"))
    for adapter in ("other", "default", "other"):
        student.set_adapter(adapter)
        assert {key.split(f".{adapter}.")[0] == key for key in trainable(student)} == {False}
        assert len(trainable(student)) == 28 + 5
    teacher_logits(student)
    assert all(".other." in key for key in trainable(student))


def test_requires_grad_can_be_set_by_adapter(bases: Bases) -> None:
    student = bases.student("llama")
    student.add_adapter("other", config_for("llama"))
    student.set_requires_grad("default", False)
    assert not trainable(student)
    student.set_requires_grad(["default", "other"], True)
    assert len(trainable(student)) == 2 * 28


# ---------------------------------------------------------------------------------------------------- deletion


@each_architecture
def test_deleting_an_idle_adapter_leaves_nothing_behind(name: str, bases: Bases) -> None:
    student = bases.student(name)
    before = copy_state(student)
    student.add_adapter("other", config_for(name))
    student.delete_adapter("other")
    assert "other" not in student.peft_config
    assert_same_tensors(copy_state(student), before)
    assert student.active_adapters == ["default"]


@each_architecture
def test_deleting_the_active_adapter_activates_the_other(name: str, bases: Bases) -> None:
    student = bases.student(name)
    student.add_adapter("other", config_for(name, bits=4))
    expected = chosen(student, "other")
    student.set_adapter("default")
    with pytest.warns(UserWarning, match="was active which is now deleted"):
        student.delete_adapter("default")
    assert student.active_adapters == ["other"]
    assert torch.equal(logits(student), expected)
    assert len(trainable(student)) == sum(2 * len(layer.parameter_names) for layer in overlays(student).values())


def test_deleting_the_last_adapter_leaves_the_teacher(bases: Bases) -> None:
    student = bases.student("mixtral")
    teacher = teacher_logits(student)
    student.delete_adapter("default")
    assert torch.equal(logits(student.base_model.model), teacher)
    assert not [key for key in student.state_dict() if ".bitdistiller_" in key]
    student.add_adapter("again", config_for("mixtral"))
    assert torch.equal(chosen(student, "again"), logits(bases.student("mixtral")))


def test_deleting_an_unknown_adapter_is_refused(bases: Bases) -> None:
    with pytest.raises(ValueError, match="unknown does not exist"):
        bases.student("llama").delete_adapter("unknown")


def test_a_taken_adapter_name_is_refused(bases: Bases) -> None:
    with pytest.raises(ValueError, match="already exists"):
        bases.student("llama").add_adapter("default", config_for("llama"))


# ------------------------------------------------------------------------------------------------------ other users


def test_trl_can_copy_the_default_adapter_to_a_reference(bases: Bases) -> None:
    """G19: TRL's preference trainers make a frozen reference by copying parameters from `.default.` to `.ref.`."""
    student = bases.student("mixtral", train_other="norms", learn_zero_point=True)
    train(student)
    expected = logits(student)
    student.add_adapter("ref", student.peft_config["default"])
    copied = 0
    for name, parameter in student.named_parameters():
        if ".default." in name:
            student.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
            copied += 1
    assert copied == len(trainable(student))
    assert torch.equal(chosen(student, "ref"), expected)
    train(student)


def test_a_config_serves_several_models(bases: Bases) -> None:
    """Wrapping one model writes nothing into the config that would not suit another."""
    from bitdistiller_peft import get_bitdistiller_model

    config = BitDistillerConfig(group_size=32, train_other="norms")
    expected = config.to_dict()
    for name in ("gpt2", "llama", "mixtral"):
        found = get_bitdistiller_model(bases.base(name), config)
        assert torch.equal(logits(found), logits(bases.student(name, train_other="norms")))
    assert config.to_dict() == expected
