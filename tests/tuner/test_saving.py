"""Every way to save and load an adapter gives the same student, bit for bit, and says what it found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.tuner import BitDistillerLayer
from tests.tiny import CONFIGS, load
from tests.tuner.common import (
    MLP,
    Bases,
    assert_same_tensors,
    config_for,
    copy_state,
    gradients,
    logits,
    overlays,
    teacher_logits,
    train,
    trainable,
)

each_architecture = pytest.mark.parametrize("name", CONFIGS)
ADAPTER_FILE = "adapter_model.safetensors"


def trained(name: str, bases: Bases, folder: Path, **kwargs: object) -> PeftModel:
    """A trained student, saved to `folder`."""
    student = bases.student(name, **kwargs)
    train(student)
    student.save_pretrained(folder)
    return student


def by_from_pretrained(base: Path, adapter: Path) -> nn.Module:
    return PeftModel.from_pretrained(load(base), adapter)


def by_from_pretrained_on_meta(base: Path, adapter: Path) -> nn.Module:
    return PeftModel.from_pretrained(load(base), adapter, low_cpu_mem_usage=True)


def by_from_pretrained_to_train(base: Path, adapter: Path) -> nn.Module:
    return PeftModel.from_pretrained(load(base), adapter, is_trainable=True)


def by_auto_class(base: Path, adapter: Path) -> nn.Module:
    return AutoPeftModelForCausalLM.from_pretrained(adapter)


def by_transformers_load_adapter(base: Path, adapter: Path) -> nn.Module:
    model = load(base)
    model.load_adapter(str(adapter))
    return model


def by_transformers_from_pretrained(base: Path, adapter: Path) -> nn.Module:
    return load(adapter)  # the folder holds an adapter; transformers looks up the base model in its config


def by_peft_load_adapter(base: Path, adapter: Path) -> nn.Module:
    config = PeftConfig.from_pretrained(adapter)
    model = get_bitdistiller_model(load(base), config)
    model.load_adapter(adapter, "second")
    model.set_adapter("second")
    return model


def by_state_dict(base: Path, adapter: Path) -> nn.Module:
    model = get_bitdistiller_model(load(base), PeftConfig.from_pretrained(adapter))
    set_peft_model_state_dict(model, load_file(adapter / ADAPTER_FILE))
    return model


WAYS = (
    by_from_pretrained,
    by_from_pretrained_on_meta,
    by_from_pretrained_to_train,
    by_auto_class,
    by_transformers_load_adapter,
    by_transformers_from_pretrained,
    by_peft_load_adapter,
    by_state_dict,
)


# the others differ in nothing that a way of loading could see
QUICK = ("llama", "gpt2", "mixtral")
QUICK_WAYS = (by_from_pretrained, by_from_pretrained_on_meta, by_transformers_load_adapter)


def pairs(quick: Callable[[object, Callable[[Path, Path], nn.Module]], bool], firsts: Iterable[object]) -> list[object]:
    """All pairs with a way of loading; those that are not quick are marked slow."""
    return [
        pytest.param(
            first, way, marks=() if quick(first, way) else pytest.mark.slow, id=f"{label(first)}-{way.__name__}"
        )
        for first in firsts
        for way in WAYS
    ]


def label(first: object) -> str:
    return "-".join(first) if isinstance(first, dict) else str(first)


@pytest.mark.parametrize(("name", "way"), pairs(lambda name, way: name in QUICK or way is QUICK_WAYS[0], CONFIGS))
def test_every_way_of_loading_gives_the_same_student(
    name: str, way: Callable[[Path, Path], nn.Module], bases: Bases, tmp_path: Path
) -> None:
    """G1, G15: also through transformers, which reads `.value` of the PEFT type."""
    student = trained(name, bases, tmp_path)
    assert torch.equal(logits(way(bases.path(name), tmp_path).eval()), logits(student))


KINDS = (
    {"bits": 3, "grid": "nf", "group_size": -1},
    {"bits": 4, "grid": "int_sym", "group_size": "tensor", "learn_scale": False},
    {"learn_zero_point": True, "zero_point_range": (1, 2)},
    {"grid": "r2q", "refine": "alternating", "overrides": {"down_proj": {"tied": True, "refine": None}}},
    {"train_other": "norms", "overrides": {"down_proj": {"bits": 8}}},
    {"target_modules": r".*\.1\..*proj", "exclude_modules": ["o_proj"]},
    {"layers_to_transform": 1, "modules_to_save": ["lm_head"]},
)


@pytest.mark.parametrize(("kwargs", "way"), pairs(lambda kwargs, way: way in QUICK_WAYS, KINDS))
def test_every_way_of_loading_works_for_every_kind_of_student(
    kwargs: dict[str, object], way: Callable[[Path, Path], nn.Module], bases: Bases, tmp_path: Path
) -> None:
    student = trained("llama", bases, tmp_path, **kwargs)
    assert torch.equal(logits(way(bases.path("llama"), tmp_path).eval()), logits(student))


@pytest.mark.parametrize("way", WAYS[:6], ids=lambda way: way.__name__)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=["bf16", "fp16"]
)
def test_master_weights_of_16_bit_models_stay_fp32_on_every_way(
    dtype: torch.dtype, way: Callable[[Path, Path], nn.Module], bases: Bases, tmp_path: Path
) -> None:
    """G8: the file holds fp32, and nothing rounds it to the base model's dtype on its way back."""
    student = get_bitdistiller_model(bases.base("llama", dtype=dtype), config_for("llama"))
    train(student, lr=1e-4)  # updates that 16 bits would lose
    student.save_pretrained(tmp_path)
    stored = load_file(tmp_path / ADAPTER_FILE)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32, torch.uint8}
    loaded = way(bases.path("llama", dtype=dtype), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(student))
    found = {key: value for key, value in loaded.state_dict().items() if ".bitdistiller_" in key}
    expected = {key: value for key, value in student.state_dict().items() if ".bitdistiller_" in key}
    assert [v.dtype for v in found.values()] == [v.dtype for v in expected.values()]
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True))


@each_architecture
def test_the_file_holds_the_adapter_and_nothing_else(name: str, bases: Bases, tmp_path: Path) -> None:
    """Every tensor is called `bitdistiller_*`, without the adapter's name, and none is the base's."""
    student = trained(name, bases, tmp_path)
    stored = load_file(tmp_path / ADAPTER_FILE)
    expected = {
        f"base_model.model.{layer_name}.bitdistiller_{parameter}.{tensor}"
        for layer_name, layer in overlays(student).items()
        for parameter in layer.parameter_names
        for tensor in ("weight", "weight_scale", "weight_zero_point")
    }
    assert set(stored) == expected
    assert_same_tensors(dict(sorted(stored.items())), dict(sorted(get_peft_model_state_dict(student).items())))
    assert all(tensor.is_contiguous() for tensor in stored.values())


@each_architecture
def test_saving_disturbs_nothing_and_loading_leaves_the_base_alone(name: str, bases: Bases, tmp_path: Path) -> None:
    student = bases.student(name)
    train(student)
    before = copy_state(student)
    student.save_pretrained(tmp_path)
    assert_same_tensors(copy_state(student), before)
    model = bases.base(name)
    original = copy_state(model)
    assert_same_tensors(copy_state(PeftModel.from_pretrained(model, tmp_path).unload()), original)


def test_a_loaded_adapter_is_frozen_unless_it_is_to_be_trained(bases: Bases, tmp_path: Path) -> None:
    """G15."""
    trained("llama", bases, tmp_path, train_other="norms")
    frozen = PeftModel.from_pretrained(bases.base("llama"), tmp_path)
    assert not trainable(frozen)
    assert frozen.peft_config["default"].inference_mode
    on = PeftModel.from_pretrained(bases.base("llama"), tmp_path, is_trainable=True)
    assert set(trainable(on)) == set(trainable(bases.student("llama", train_other="norms")))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_training_goes_on_after_loading_as_if_nothing_had_happened(
    low_cpu_mem_usage: bool, bases: Bases, tmp_path: Path
) -> None:
    student = trained("mixtral", bases, tmp_path, learn_zero_point=True)
    loaded = PeftModel.from_pretrained(
        bases.base("mixtral"), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert_same_tensors(gradients(loaded), gradients(student))
    train(student)
    train(loaded)
    assert torch.equal(logits(loaded), logits(student))


def test_low_cpu_mem_usage_copies_no_base_weight(bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G15: the adapter is created on the meta device and filled from the file."""
    trained("llama", bases, tmp_path)
    start = BitDistillerLayer._start_weight

    def without_copy(self: BitDistillerLayer, name: str, dtype: torch.dtype | None) -> torch.Tensor:
        weight = start(self, name, dtype)
        assert weight.is_meta, "a copy was made, to be thrown away"
        return weight

    monkeypatch.setattr(BitDistillerLayer, "_start_weight", without_copy)
    student = get_bitdistiller_model(bases.base("llama"), PeftConfig.from_pretrained(tmp_path), low_cpu_mem_usage=True)
    ours = [value for key, value in student.state_dict().items() if ".bitdistiller_" in key]
    assert {value.device.type for value in ours} == {"meta"}
    loaded = PeftModel.from_pretrained(bases.base("llama"), tmp_path, low_cpu_mem_usage=True)
    assert {value.device.type for value in loaded.state_dict().values()} == {"cpu"}
    assert torch.equal(teacher_logits(loaded), logits(bases.base("llama")))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"bits": 4, "group_size": "tensor", "grid": "int_sym", "scale_dtype": "bfloat16"},
        {"bits": 3, "group_size": -1, "grid": "nf", "learn_scale": False, "gradient": "ste"},
        {"zero_point_range": (1, 2), "learn_zero_point": True, "master_dtype": "base"},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"], "train_other": "norms"},
        {"target_modules": ".*down_proj", "layers_to_transform": [1], "layers_pattern": "layers"},
        {"overrides": {"down_proj": {"bits": 4, "group_size": 64}}, "modules_to_save": ["lm_head"]},
        {"task_type": TaskType.CAUSAL_LM},
    ],
    ids=lambda kwargs: "-".join(kwargs) or "defaults",
)
def test_a_config_survives_its_file(kwargs: dict[str, object], tmp_path: Path) -> None:
    config = BitDistillerConfig(**kwargs)
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is BitDistillerConfig
    assert again == config
    assert again.spec("model.layers.1.mlp.down_proj") == config.spec("model.layers.1.mlp.down_proj")
    assert BitDistillerConfig.from_pretrained(tmp_path) == config
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "BITDISTILLER"


def test_a_config_written_by_a_newer_version_loads_with_a_warning(tmp_path: Path) -> None:
    BitDistillerConfig(bits=3).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"knob_of_the_future": 1}))
    with pytest.warns(UserWarning, match="knob_of_the_future"):
        assert PeftConfig.from_pretrained(tmp_path) == BitDistillerConfig(bits=3)


def test_the_config_in_the_folder_names_the_base_model_and_the_targets(bases: Bases, tmp_path: Path) -> None:
    student = trained("llama", bases, tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.base_model_name_or_path == str(bases.path("llama"))
    assert config.inference_mode
    assert config.target_modules == student.peft_config["default"].target_modules
    assert (tmp_path / "README.md").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_incomplete_file_is_reported_with_the_missing_names(bases: Bases, tmp_path: Path) -> None:
    """The prefix in our names is what PEFT's warning about missing keys looks for."""
    from safetensors.torch import save_file

    trained("llama", bases, tmp_path)
    tensors = load_file(tmp_path / ADAPTER_FILE)
    lost = next(key for key in tensors if key.endswith("weight_scale"))
    del tensors[lost]
    save_file(tensors, tmp_path / ADAPTER_FILE, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"missing adapter keys.*weight_scale"):
        PeftModel.from_pretrained(bases.base("llama"), tmp_path)


def test_torch_files_work_too(bases: Bases, tmp_path: Path) -> None:
    student = bases.student("llama")
    train(student)
    student.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / ADAPTER_FILE).exists()
    assert torch.equal(logits(PeftModel.from_pretrained(bases.base("llama"), tmp_path)), logits(student))


def test_the_whole_state_dict_of_a_student_loads_into_another(bases: Bases) -> None:
    student, other = bases.student("mixtral"), bases.student("mixtral")
    train(student)
    other.load_state_dict(student.state_dict())
    assert torch.equal(logits(other), logits(student))


def test_a_plain_torch_student_saves_and_loads(tmp_path: Path) -> None:
    student = get_bitdistiller_model(MLP(), BitDistillerConfig(group_size=32, modules_to_save=["norm"]))
    train(student)
    student.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(MLP(), tmp_path)), logits(student))
