"""A score says what was evaluated: every state is recognised, and what nobody could deploy is refused."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from bitdistiller_peft import BitDistillerConfig, BitDistillerQuantConfig
from bitdistiller_peft.errors import StateError
from bitdistiller_peft.evaluation.state import detect_state

LORA = LoraConfig(r=2, target_modules=["q_proj"])


def quantized(folder, state: str):
    config = BitDistillerQuantConfig(bits=2, group_size=32, state=state)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def test_a_plain_model_is_full_precision(model) -> None:
    assert detect_state(model) == "full_precision"


def test_a_student_is_one_while_its_adapter_is_on(student) -> None:
    assert detect_state(student) == "student"
    with student.disable_adapter():
        assert detect_state(student) == "full_precision"
    assert detect_state(student) == "student"


def test_a_merged_student_is_still_one(student) -> None:
    student.merge_adapter()
    assert detect_state(student) == "student"


def test_what_was_packed_is_packed_in_memory_and_from_disk(student, folder, tmp_path) -> None:
    packed = student.pack_and_unload(progressbar=False)
    assert detect_state(packed) == "packed"
    packed.save_pretrained(tmp_path)
    assert detect_state(AutoModelForCausalLM.from_pretrained(tmp_path)) == "packed"
    assert detect_state(quantized(folder, "packed")) == "packed"


def test_a_latent_checkpoint_is_named_as_such(folder, tmp_path) -> None:
    latent = quantized(folder, "latent")
    assert detect_state(latent) == "latent"
    latent.save_pretrained(tmp_path)
    assert detect_state(AutoModelForCausalLM.from_pretrained(tmp_path)) == "latent"


@pytest.mark.parametrize("as_dict", [False, True])
def test_master_weights_without_quantization_are_refused_unless_asked_for(model, as_dict: bool) -> None:
    config = BitDistillerQuantConfig(state="latent")
    model.config.quantization_config = config.to_dict() if as_dict else config
    with pytest.raises(StateError, match="allow_latent=True"):
        detect_state(model)
    assert detect_state(model, allow_latent=True) == "latent_float"


def test_another_method_is_not_called_full_precision(model) -> None:
    model.config.quantization_config = {"quant_method": "gptq"}
    assert detect_state(model) == "foreign:gptq"


def test_adapters_of_other_methods_are_named_while_they_are_active(model, folder) -> None:
    adapted = get_peft_model(model, LORA)
    assert detect_state(adapted) == "full_precision+lora"
    with adapted.disable_adapter():
        assert detect_state(adapted) == "full_precision"
    assert detect_state(get_peft_model(quantized(folder, "packed"), LORA)) == "packed+lora"


def test_a_student_in_force_in_some_layers_only_is_refused(student) -> None:
    student.add_adapter("attention", BitDistillerConfig(bits=2, group_size=32, target_modules=["q_proj"]))
    student.set_adapter("attention")
    with pytest.raises(StateError, match=r"every layer or in none.*'.*k_proj'"):
        detect_state(student)
