"""SubLN, int8 activations and either packing survive training, packing, saving and loading, and get out of the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitdistiller_peft import BitDistillerConfig, BitDistillerQuantConfig, get_bitdistiller_model, quant_summary
from bitdistiller_peft.errors import CheckpointError, ConfigError, StateError, TargetError
from bitdistiller_peft.hub.manifest import write_manifest
from bitdistiller_peft.hub.projections import has_subln
from bitdistiller_peft.layers import PackedLinear, SubLN, input_norm
from tests.hub.models import assert_same_state, copy_of, logits, make_packed, make_student
from tests.tiny import load, save_base

BITNET = {"grid": "ternary", "group_size": "tensor", "gradient": "ste", "learn_scale": False, "activation_bits": 8}
ARCHITECTURES = ("llama", "qwen2", "gemma3", "gpt2", "opt")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def norms(model: torch.nn.Module) -> dict[str, SubLN]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SubLN)}


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("llama", {"subln": "output"}),
        ("qwen2", {"subln": "all", "packing": "base3"}),
        ("gemma3", {"subln": "output", "packing": "base3", "dtype": torch.bfloat16}),
        ("gpt2", {"subln": "output", "group_size": 32}),
        ("opt", {"subln": "all", "activation_bits": None, "group_size": -1, "packing": "base3"}),
        ("llama", {"subln": "output", "grid": "int", "group_size": 32, "learn_scale": True}),
        ("llama-172", {"subln": "none", "packing": "base3"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_what_was_trained_is_packed_saved_and_loaded(
    arch: str, settings: dict[str, Any], bases: Path, tmp_path: Path
) -> None:
    student = make_student(arch, bases, **{**BITNET, **settings})
    base = load(save_base(arch, bases, dtype=settings.get("dtype", torch.float32)))
    with student.disable_adapter():
        assert torch.equal(logits(student), logits(base)), "the teacher is not exact"
    gains = [norm.weight.detach().clone() for norm in norms(student).values()]
    assert bool(gains) == (settings["subln"] != "none")
    assert all(bool((gain != 1).any()) for gain in gains), "a gain was not trained"

    trained = logits(student)
    packed = student.pack_and_unload(progressbar=False)
    assert torch.equal(logits(packed), trained)
    packed.save_pretrained(tmp_path / "packed")
    loaded = load(tmp_path / "packed")
    assert torch.equal(logits(loaded), trained)
    assert_same_state(loaded, packed)
    assert all(torch.equal(n.weight, gain) for n, gain in zip(norms(loaded).values(), gains, strict=True))
    assert not any(norm.weight.requires_grad for norm in norms(loaded).values())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_output_projections_of_attention_and_mlp_are_found(arch: str, bases: Path) -> None:
    model = get_bitdistiller_model(load(save_base(arch, bases)), BitDistillerConfig(group_size=32, subln="output"))
    ends = {name.partition(".bitdistiller_")[0].rpartition(".")[2] for name in norms(model)}
    assert ends == {"gpt2": {"c_proj"}, "opt": {"out_proj", "fc2"}}.get(arch, {"o_proj", "down_proj"})
    assert len(norms(model)) == 4  # two a layer


def test_an_adapter_keeps_its_gains_on_reload(bases: Path, tmp_path: Path) -> None:
    student = make_student("llama", bases, subln="all", **BITNET)
    student.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(save_base("llama", bases)), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(student))
    quick = PeftModel.from_pretrained(load(save_base("llama", bases)), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(quick), logits(student))


def test_adapters_with_and_without_norms_stand_side_by_side(bases: Path) -> None:
    student = make_student("llama", bases, subln="output", **BITNET)
    first = logits(student)
    student.add_adapter("plain", BitDistillerConfig(group_size=32))
    student.set_adapter("plain")
    plain = get_bitdistiller_model(load(save_base("llama", bases)), BitDistillerConfig(group_size=32)).eval()
    assert torch.equal(logits(student), logits(plain))
    assert quant_summary(student).num_bytes == quant_summary(plain).num_bytes
    student.set_adapter("default")
    assert torch.equal(logits(student), first)


@pytest.mark.parametrize("settings", [{"subln": "output"}, {"activation_bits": 8}], ids=["subln", "int8"])
def test_merging_is_refused_before_anything_changes(settings: dict[str, Any], bases: Path) -> None:
    student = make_student("llama", bases, steps=0, **settings)
    before = logits(student)
    for merge in (student.merge_and_unload, student.merge_adapter):
        with pytest.raises(StateError, match=r"must not be merged.*Use pack_and_unload"):
            merge()
        assert torch.equal(logits(student), before)
    with student.disable_adapter():
        assert torch.equal(logits(student), logits(load(save_base("llama", bases))))


def test_the_config_on_disk_is_complete_and_base3_is_counted(bases: Path, tmp_path: Path) -> None:
    sizes = {}
    for packing in ("bitstream", "base3"):
        packed = make_packed("llama", bases, steps=0, subln="output", packing=packing, **BITNET)
        row = next(row for row in quant_summary(packed).rows if row.kind == "ternary")
        sizes[packing] = row.stored_bits
        words = sum(m.weight.numel() + 0.5 for m in packed.modules() if isinstance(m, PackedLinear))  # and fp16 scales
        assert row.stored_bits == 32 * words
    assert sizes["base3"] < sizes["bitstream"]
    packed.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (stored["activation_bits"], stored["subln"], stored["packing"]) == (8, "output", "base3")
    assert stored["subln_eps"] == 1e-8
    assert stored["subln_modules"] == sorted(n for n, m in packed.named_modules() if input_norm(m) is not None)


def test_a_latent_model_gets_its_norms_while_loading(bases: Path, tmp_path: Path) -> None:
    config = BitDistillerQuantConfig(state="latent", subln="output", **BITNET)
    model = AutoModelForCausalLM.from_pretrained(save_base("llama", bases), quantization_config=config)
    assert [norm.weight.unique().tolist() for norm in norms(model).values()] == [[1.0]] * 4
    assert all(norm.weight.requires_grad for norm in norms(model).values())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=torch.arange(8).unsqueeze(0), labels=torch.arange(8).unsqueeze(0)).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), logits(model.eval()))
    assert all(bool((norm.weight != 1).any()) for norm in norms(loaded).values())


@pytest.fixture(scope="module")
def saved(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "packed"
    make_packed("llama", bases, subln="output", packing="base3", **BITNET).save_pretrained(folder)
    return folder


def damage(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_manifest(folder, "a test")


O_PROJ = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{O_PROJ}.input_norm.weight"), r"input_norm.*missing"),
        (lambda t: t[f"{O_PROJ}.input_norm.weight"].fill_(float("nan")), "finite"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.input_norm.weight": torch.ones(64)}), "no SubLN"),
        (lambda t: t[f"{O_PROJ}.weight"].fill_(-1), "at most 242"),
    ],
    ids=["lost gain", "broken gain", "stray gain", "impossible codes"],
)
def test_damage_is_found_on_load(change: Any, message: str, saved: Path, tmp_path: Path) -> None:
    folder = copy_of(saved, tmp_path / "damaged")
    damage(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_gains_stay_fp32_in_a_model_loaded_in_another_dtype(saved: Path) -> None:
    loaded = load(saved, dtype=torch.bfloat16)
    assert {norm.weight.dtype for norm in norms(loaded).values()} == {torch.float32}
    for name, norm in norms(load(saved)).items():
        assert torch.equal(norm.weight, norms(loaded)[name].weight)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"packing": "base3"}, ConfigError, "must be 'bitstream' for a grid with 4 levels"),
        ({"packing": "base4"}, ConfigError, "`packing` must be one of"),
        ({"activation_bits": 4}, ConfigError, "`activation_bits` must be None or 8"),
        ({"subln": "input"}, ConfigError, "`subln` must be one of"),
        ({"subln_modules": ["o_proj"]}, ConfigError, "must come with subln='output'"),
        ({"subln": "output", "subln_modules": "o_proj"}, ConfigError, "must be a list of names"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("config", [BitDistillerConfig, BitDistillerQuantConfig])
def test_settings_that_cannot_work_are_refused(
    config: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        config(**settings)


@pytest.mark.parametrize(
    ("arch", "settings", "message"),
    [
        ("llama", {"subln": "output", "target_modules": ["q_proj"]}, r"no quantized layer has a known name.*q_proj"),
        ("llama", {"subln": "output", "subln_modules": ["o_proj", "fc9"]}, "no layer ends in 'fc9'"),
        ("mixtral", {"subln": "output"}, "must be off for fused experts"),
        ("mixtral", {"activation_bits": 8}, "must be off for fused experts"),
    ],
    ids=["none", "unmatched", "experts-subln", "experts-int8"],
)
def test_a_model_that_does_not_suit_is_refused(arch: str, settings: dict[str, Any], message: str, bases: Path) -> None:
    model = load(save_base(arch, bases))
    before = logits(model)
    with pytest.raises(TargetError, match=message):
        get_bitdistiller_model(model, BitDistillerConfig(group_size=32, **settings))
    assert torch.equal(logits(model), before)


def test_endings_match_whole_parts_of_a_name() -> None:
    assert has_subln("model.layers.0.mlp.down_proj", "output", None)
    assert has_subln("h.0.self_attn.dense", "output", None)
    assert not has_subln("h.0.mlp.dense", "output", None)
    assert not has_subln("layers.0.two_proj", "output", ["o_proj"])
    assert has_subln("layers.0.self_attn.o_proj", "output", ["model.layers.0.self_attn.o_proj"])
