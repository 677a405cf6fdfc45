"""What was trained is what is packed: the same logits, codes and values, or an error and an unchanged student."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.errors import BitDistillerError, ScaleRangeError, StateError, WeightError
from bitdistiller_peft.kernels import dequantize_packed
from bitdistiller_peft.layers import PackedExperts, PackedLinear, iter_quantized, packed_params, quantized
from bitdistiller_peft.packing import unpack_codes
from tests.tiny import CONFIGS, load, token_ids
from tests.tuner.common import (
    MLP,
    Bases,
    config_for,
    copy_state,
    logits,
    overlays,
    teacher_logits,
    train,
    trainable,
    unchanged,
)

each_architecture = pytest.mark.parametrize("name", CONFIGS)


def pack(student: PeftModel) -> nn.Module:
    """Pack quietly."""
    return student.pack_and_unload(progressbar=False)


def trained_codes(student: PeftModel) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    """Codes, scales and zero points of the active adapter, by parameter."""
    found = {}
    for layer_name, layer in overlays(student).items():
        for parameter in layer.parameter_names:
            codes, params = quantized(layer.active_student(parameter), "weight")
            found[f"{layer_name}.{parameter}"] = (codes, params.scale, params.zero_point)
    return found


def trained_values(student: PeftModel) -> dict[str, Tensor]:
    """The fake-quantized values of the active adapter, by parameter."""
    return {
        f"{layer_name}.{parameter}": layer.active_student(parameter)().detach()
        for layer_name, layer in overlays(student).items()
        for parameter in layer.parameter_names
    }


def in_features(module: nn.Module, name: str) -> int:
    return module.in_features if isinstance(module, PackedLinear) else module.in_features[name]


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],
    ids=["fp32", "bf16", "fp16"],
)
@each_architecture
def test_the_packed_model_computes_what_the_student_computed(name: str, dtype: torch.dtype, bases: Bases) -> None:
    """G9: also in 16 bits, from fp32 master weights."""
    student = get_bitdistiller_model(bases.base(name, dtype=dtype), config_for(name))
    train(student, lr=1e-3)
    expected = logits(student)
    packed = pack(student)
    assert torch.equal(logits(packed), expected)
    assert logits(packed).dtype == dtype


@each_architecture
def test_codes_scales_and_values_are_the_trained_ones(name: str, bases: Bases) -> None:
    student = bases.student(name)
    train(student)
    codes, values = trained_codes(student), trained_values(student)
    packed = pack(student)
    seen = set()
    for layer_name, module, parameter, spec in iter_quantized(packed):
        key = f"{layer_name}.{parameter}"
        seen.add(key)
        words, width = getattr(module, parameter), in_features(module, parameter)
        expected_codes, expected_scale, expected_zero_point = codes[key]
        assert torch.equal(unpack_codes(words, spec.grid.bits, width), expected_codes), key
        params = packed_params(module, parameter)
        assert params.scale.dtype == torch.float16
        assert torch.equal(params.scale, expected_scale), key
        zero_point = unpack_codes(params.zero_point, spec.grid.bits, expected_zero_point.shape[-1])
        assert torch.equal(zero_point, expected_zero_point), key
        assert torch.equal(dequantize_packed(words, params, spec, width, torch.float32), values[key]), key
    assert seen == set(codes)


KINDS = [
    {"bits": 3},
    {"bits": 4, "group_size": 64},
    {"bits": 8, "group_size": -1},
    {"bits": 2, "group_size": 8, "scale_dtype": "float32"},
    {"bits": 3, "grid": "int_sym"},
    {"bits": 2, "grid": "nf"},
    {"bits": 4, "grid": "nf", "scale_dtype": "bfloat16"},
    {"bits": 3, "grid": "nf_sym", "group_size": -1},
    {"bits": 3, "grid": "fp"},
    {"bits": 4, "grid": "fp_sym"},
    {"grid": "ternary", "group_size": -1, "learn_scale": False, "gradient": "ste"},
    {"grid": "r2q", "refine": "alternating"},
    {"grid": "r2q", "tied": True, "learn_scale": False},
    {"learn_scale": False},
    {"learn_scale": False, "grid": "nf", "gradient": "ste"},
    {"learn_zero_point": True},
    {"learn_zero_point": True, "zero_point_range": (1, 2)},
    {"zero_point_range": (1, 2), "learn_scale": False},
    {"scale_dtype": "float32"},
    {"master_dtype": "base"},
]


@pytest.mark.parametrize("kwargs", KINDS, ids=lambda k: "-".join(f"{key}={value}" for key, value in k.items()))
@pytest.mark.parametrize("name", ["qwen2", pytest.param("gpt2", marks=pytest.mark.slow), "mixtral"])
def test_every_kind_of_student_packs_exactly(name: str, kwargs: dict[str, object], bases: Bases) -> None:
    student = bases.student(name, **kwargs)
    train(student)
    expected, values = logits(student), trained_values(student)
    packed = pack(student)
    assert torch.equal(logits(packed), expected)
    for layer_name, module, parameter, spec in iter_quantized(packed):
        words, width = getattr(module, parameter), in_features(module, parameter)
        found = dequantize_packed(words, packed_params(module, parameter), spec, width, torch.float32)
        assert torch.equal(found, values[f"{layer_name}.{parameter}"])


@pytest.mark.parametrize("grid", ["int", "int_sym"])
def test_one_scale_for_a_matrix_packs_exactly(grid: str, bases: Bases) -> None:
    student = bases.student("qwen2", group_size="tensor", grid=grid)
    train(student)
    expected = logits(student)
    packed = pack(student)
    assert torch.equal(logits(packed), expected)
    assert packed.model.layers[0].mlp.up_proj.weight_scale.shape == (1, 1)


@each_architecture
def test_only_the_overlaid_layers_change_and_nothing_of_peft_is_left(name: str, bases: Bases) -> None:
    """G4, G6: codes are integers, and nothing is trainable."""
    model = bases.base(name)
    before = {key: (type(module), id(module)) for key, module in model.named_modules()}
    student = get_bitdistiller_model(model, config_for(name, train_other="norms"))
    layers = overlays(student)
    packed = pack(student)
    assert packed is model
    assert not hasattr(packed, "peft_config")
    assert not [key for key, _ in packed.named_modules() if "bitdistiller_" in key or "modules_to_save" in key]
    assert not trainable(packed)
    for key, module in packed.named_modules():
        if key in layers:
            assert isinstance(module, (PackedLinear, PackedExperts))
        elif "norm" not in key and ".ln_" not in key:
            assert (type(module), id(module)) == before[key], key
    for _, module, parameter, _ in iter_quantized(packed):
        assert getattr(module, parameter).dtype == torch.int32
    assert set(dict(packed.named_modules())) == set(before)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "opt"])
def test_biases_are_kept(name: str, bases: Bases) -> None:
    model = bases.base(name)
    biases = {
        key: module.bias
        for key, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module.bias is not None
    }
    assert biases
    student = get_bitdistiller_model(model, config_for(name))
    train(student)
    packed = pack(student)
    for key, bias in biases.items():
        assert packed.get_submodule(key).bias is bias


def test_a_transposed_weight_is_packed_upright(bases: Bases) -> None:
    """G33: `Conv1D` stores ``[in, out]``, a packed layer ``[out, in]``."""
    packed = pack(bases.student("gpt2"))
    layer = packed.transformer.h[0].mlp.c_fc
    assert (layer.in_features, layer.out_features) == (64, 256)
    assert layer.weight.shape == (256, 64 * 2 // 32)
    assert layer.weight_scale.shape == (256, 2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "qwen3-moe"])
def test_trained_norms_are_carried_over(name: str, bases: Bases, tmp_path: Path) -> None:
    """G7."""
    student = bases.student(name, train_other="norms")
    train(student, lr=0.05)
    trained = {
        key.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): p.detach().clone()
        for key, p in trainable(student).items()
        if ".modules_to_save." in key
    }
    expected = logits(student)
    packed = pack(student)
    state = packed.state_dict()
    assert all(torch.equal(state[key], value) for key, value in trained.items())
    assert torch.equal(logits(packed), expected)
    packed.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), expected)


def test_a_trained_head_and_embeddings_are_carried_over(bases: Bases, tmp_path: Path) -> None:
    student = bases.student("llama", train_other="all", modules_to_save=["v_proj"])
    train(student, lr=0.05)
    expected = logits(student)
    packed = pack(student)
    assert torch.equal(logits(packed), expected)
    skipped = packed.config.quantization_config.modules_to_not_convert
    assert skipped == ["lm_head", "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]
    packed.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), expected)


@each_architecture
def test_the_packed_model_saves_and_reloads_in_shards(name: str, bases: Bases, tmp_path: Path) -> None:
    student = bases.student(name)
    train(student)
    expected = logits(student)
    pack(student).save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path)), expected)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_lie_on_disk_one_by_one(name: str, bases: Bases, tmp_path: Path) -> None:
    """G28: codes and scales of an expert are kept together, under the model's own names on disk."""
    pack(bases.student(name)).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    experts = {key for key in names if "experts" in key}
    assert not [key for key in experts if "gate_up_proj" in key]
    weights = {key for key in experts if key.endswith(".weight")}
    assert len(weights) == 2 * 4 * 3  # layers, experts, matrices
    assert experts == weights | {f"{key}_{what}" for key in weights for what in ("scale", "zero_point")}


# ----------------------------------------------------------------------------------------------- what the config says


def test_the_config_describes_exactly_what_was_packed(bases: Bases, tmp_path: Path) -> None:
    overrides = {
        "down_proj": {"bits": 4, "group_size": 64},
        r"layers\.1\..*q_proj": {"grid": "nf", "scale_dtype": "float32"},
        "v_proj": {"zero_point_range": [1, 2]},
    }
    student = bases.student("llama", overrides=overrides, exclude_modules=["gate_proj"])
    train(student)
    expected = logits(student)
    packed = pack(student)
    config = packed.config.quantization_config
    assert (config.bits, config.grid, config.group_size, config.scale_dtype, config.state) == (
        2, "int", 32, "float16", "packed",
    )  # fmt: skip
    assert config.modules_to_not_convert == ["lm_head", *(f"model.layers.{i}.mlp.gate_proj" for i in (0, 1))]
    assert config.overrides == {
        "model.layers.0.mlp.down_proj": {"bits": 4, "group_size": 64},
        "model.layers.1.mlp.down_proj": {"bits": 4, "group_size": 64},
        "model.layers.1.self_attn.q_proj": {"grid": "nf", "scale_dtype": "float32"},
        "model.layers.0.self_attn.v_proj": {"zero_point_range": [1, 2]},
        "model.layers.1.self_attn.v_proj": {"zero_point_range": [1, 2]},
    }
    assert config.provenance["base_model"] == str(bases.path("llama"))
    assert torch.equal(logits(packed), expected)
    packed.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert stored["overrides"] == config.overrides
    assert torch.equal(logits(load(tmp_path)), expected)


@each_architecture
def test_the_list_of_what_is_not_quantized_is_complete(name: str, bases: Bases, tmp_path: Path) -> None:
    """G23: also what was left out by layer, and nothing that was packed."""
    student = bases.student(name, layers_to_transform=[1], layers_pattern=["layers", "h"])
    expected = logits(student)
    layers = set(overlays(student))
    packed = pack(student)
    left_out = {
        key
        for key, module in packed.named_modules()
        if key not in layers and (isinstance(module, (nn.Linear, Conv1D)) or type(module).__name__.endswith("Experts"))
    }
    config = packed.config.quantization_config
    assert set(config.modules_to_not_convert) == left_out
    packed.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), expected)


def test_the_commonest_settings_become_the_defaults(bases: Bases) -> None:
    student = bases.student("llama", bits=4, overrides={r".*(q|k|v|o|gate)_proj": {"bits": 3}})
    config = pack(student).config.quantization_config
    assert config.bits == 3
    assert set(config.overrides) == {f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("up", "down")}


# ------------------------------------------------------------------------------------------------- which student


def test_the_active_adapter_is_packed(bases: Bases) -> None:
    student = bases.student("mixtral", train_other="norms")
    train(student)
    student.add_adapter("other", config_for("mixtral", bits=4, train_other="norms"))
    student.set_adapter("other")
    train(student)
    expected = logits(student)
    packed = pack(student)
    assert torch.equal(logits(packed), expected)
    assert packed.config.quantization_config.bits == 4


def test_an_adapter_on_some_layers_is_packed_when_it_is_the_only_one(bases: Bases) -> None:
    student = bases.student("llama")
    student.add_adapter("some", config_for("llama", layers_to_transform=[1]))
    student.set_adapter("some")
    message = r"must cover every layer: layer 'model\.layers\.0\.self_attn\.q_proj' lacks \['some'\].*set_adapter\(\)"
    with unchanged(student), pytest.raises(StateError, match=message):
        pack(student)
    student.set_adapter("default")
    student.delete_adapter("some")
    expected = logits(student)
    assert torch.equal(logits(pack(student)), expected)


def test_a_loaded_frozen_student_packs(bases: Bases, tmp_path: Path) -> None:
    student = bases.student("gpt2")
    train(student)
    student.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bases.base("gpt2"), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(pack(loaded)), logits(student))


def test_an_unmerged_student_packs(bases: Bases) -> None:
    student = bases.student("llama")
    train(student)
    expected = logits(student)
    student.merge_adapter()
    student.unmerge_adapter()
    assert torch.equal(logits(pack(student)), expected)


def test_a_packed_model_generates_like_the_student(bases: Bases) -> None:
    student = bases.student("llama")
    train(student)
    prompt = {"input_ids": token_ids(1, 4), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = student.generate(**prompt, **settings)
    assert torch.equal(pack(student).generate(**prompt, **settings), expected)


def test_packing_keeps_the_training_mode_of_the_layers(bases: Bases) -> None:
    for mode in (True, False):
        packed = pack(bases.student("llama").train(mode))
        assert {module.training for module in packed.modules()} == {mode}


def test_a_plain_torch_student_packs() -> None:
    student = get_bitdistiller_model(MLP(), BitDistillerConfig(group_size=32, train_other="norms"))
    train(student)
    expected = logits(student)
    packed = pack(student)
    assert torch.equal(logits(packed), expected)
    assert isinstance(packed.lin0, PackedLinear)


# ---------------------------------------------------------------------------------------------------- refusals


def break_weight(student: PeftModel, layer: str, parameter: str) -> None:
    overlays(student)[layer].student(parameter, "default").weight[..., 3, 5] = float("nan")


def break_scale_by_overflow(student: PeftModel, layer: str, parameter: str) -> None:
    overlays(student)[layer].student(parameter, "default").weight_scale[..., 2, 1] = 1e6


def break_scale_by_nan(student: PeftModel, layer: str, parameter: str) -> None:
    overlays(student)[layer].student(parameter, "default").weight_scale[..., 2, 1] = float("nan")


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (break_weight, WeightError, "the weight must be finite: got NaN or Inf"),
        (break_scale_by_overflow, ScaleRangeError, r"the scale must be at most 6\.55e\+04 to be stored as float16"),
        (break_scale_by_nan, WeightError, "must be finite"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize(
    ("name", "layer", "parameter"),
    [
        ("llama", "model.layers.1.mlp.down_proj", "weight"),
        ("gpt2", "transformer.h.1.mlp.c_proj", "weight"),
        ("mixtral", "model.layers.1.mlp.experts", "down_proj"),
    ],
)
def test_a_failing_pack_names_the_layer_and_changes_nothing(
    name: str,
    layer: str,
    parameter: str,
    damage: Callable[[PeftModel, str, str], None],
    error: type[BitDistillerError],
    message: str,
    bases: Bases,
) -> None:
    student = bases.student(name, train_other="norms")
    train(student)
    teacher, expected, healthy = teacher_logits(student), logits(student), copy_state(student)
    with torch.no_grad():
        damage(student, layer, parameter)
    with unchanged(student), pytest.raises(error, match=rf"In layer '{layer}': .*{message}"):
        pack(student)
    assert torch.equal(teacher_logits(student), teacher)
    student.load_state_dict(healthy)
    assert torch.equal(logits(student), expected)
    train(student)
    expected = logits(student)
    assert torch.equal(logits(pack(student)), expected)


def test_a_merged_student_is_not_packed(bases: Bases) -> None:
    student = bases.student("mixtral")
    student.merge_adapter()
    message = r"must not be merged: layer 'model\.layers\.0\.self_attn\.q_proj' is\. Call unmerge_adapter\(\) first"
    with unchanged(student), pytest.raises(StateError, match=message):
        pack(student)


def test_a_disabled_student_is_not_packed(bases: Bases) -> None:
    student = bases.student("llama")
    message = r"must be enabled: layer 'model\.layers\.0\.self_attn\.q_proj' is not\. Leave disable_adapter\(\) first"
    with student.disable_adapter(), unchanged(student), pytest.raises(StateError, match=message):
        pack(student)
    expected = logits(student)
    assert torch.equal(logits(pack(student)), expected)


@pytest.mark.parametrize("ending", ["pack_and_unload", "merge_and_unload", "unload"])
def test_a_student_that_is_used_up_is_not_packed_again(ending: str, bases: Bases) -> None:
    student = bases.student("llama")
    getattr(student, ending)()
    message = "must hold trained layers: got none. It was packed, merged or unloaded before"
    with pytest.raises(StateError, match=message):
        pack(student)


_PEAK = """
import ctypes, gc
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model

def held(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))

config = LlamaConfig(
    vocab_size=64, hidden_size=512, intermediate_size=1408, num_hidden_layers=12, num_attention_heads=8,
    tie_word_embeddings=True,
)
model = get_bitdistiller_model(LlamaForCausalLM(config), BitDistillerConfig(bits=2, group_size=64))
student = sum(4 * p.numel() for n, p in model.named_parameters() if "bitdistiller" in n)
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
before = held("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model.pack_and_unload(progressbar=False)
print((held("VmHWM") - before) / student, (held("VmRSS") - before) / student)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel's marks of memory")
def test_packing_takes_little_memory_and_gives_the_students_back() -> None:
    done = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, after = map(float, done.stdout.split()[-2:])
    assert peak < 0.5
    assert after < -0.5
