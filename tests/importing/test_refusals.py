"""What no grid of ours holds, and settings that the checkpoint determines, are refused with what would work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file

from bitdistiller_peft import import_model
from bitdistiller_peft.errors import CheckpointError, ConfigError, ForeignModelError, UnknownNameError
from bitdistiller_peft.importing import ImportFormat, get_import_format, import_format_names, register_import_format
from bitdistiller_peft.importing import formats as formats_module
from bitdistiller_peft.importing.affine import affine_weight
from tests.hub.models import logits, make_packed
from tests.importing import foreign as f
from tests.tiny import load, save_base


@pytest.fixture
def folder(base: Path, tmp_path: Path, generator: torch.Generator) -> Path:
    """A GPTQ checkpoint (v1, 4 bits) to be changed."""
    weights = {layer: f.draw(shape, 4, generator) for layer, shape in f.LAYERS.items()}
    return f.gptq_folder(base, tmp_path / "gptq", weights, 4)


def qzeros_of_15(generator: torch.Generator) -> torch.Tensor:
    weight = f.draw(f.LAYERS[f.DOWN], 4, generator)._replace(zero_point=torch.full((64, 4), 16))
    return f.gptq(weight, 4)["qzeros"]


def test_scattered_groups_are_refused(folder: Path) -> None:
    index = torch.arange(128, dtype=torch.int32).flip(0) // 32
    f.edit(folder, {f"{f.DOWN}.g_idx": index})
    with pytest.raises(ForeignModelError, match=rf"'{f.DOWN}'.*`g_idx`.*desc_act=True.*desc_act=False"):
        import_model(folder)


def test_a_zero_point_that_readers_disagree_about_is_refused(folder: Path, generator: torch.Generator) -> None:
    f.edit(folder, {f"{f.DOWN}.qzeros": qzeros_of_15(generator)})
    with pytest.raises(ForeignModelError, match=r"got 15, which some readers take for -1 \+ 1.*gptq_v2"):
        import_model(folder)


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"bits": 5}, r"`bits` of the checkpoint must be one of \[4, 8, 2, 3\]: got bits=5"),
        ({"bits": "4"}, "got bits='4'"),
        ({"bits": True}, "got bits=True"),
        ({"checkpoint_format": "marlin"}, "Layouts for one kernel"),
        ({"pack_dtype": "int64"}, "Pack the model in int32 words"),
        ({"rotation": "hadamard"}, "Its inputs are rotated as well"),
        (
            {"quant_method": "quip"},
            r"must be one of \['gptq', 'awq', 'compressed-tensors', 'bitsandbytes'\]: got 'quip'",
        ),
        ({"quant_method": "bitdistiller"}, "must be quantized by another tool"),
        ({"quant_method": "awq", "version": "gemv"}, "Other layouts are for one kernel"),
        ({"quant_method": "awq", "bits": 3}, "AWQ has 4-bit codes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "Only NF4"),
        ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"}, "Only NF4"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "Only integer weights"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}, "`config_groups`"),
    ],
    ids=str,
)
def test_configs_that_mean_something_else_are_refused(section: dict[str, Any], match: str, folder: Path) -> None:
    f.edit(folder, {}, **section)
    with pytest.raises((ForeignModelError, CheckpointError), match=match):
        import_model(folder)


@pytest.mark.parametrize(
    ("group", "match"),
    [
        ({"weights": {"num_bits": 4, "type": "float", "strategy": "group"}}, "`type`"),
        ({"weights": {"num_bits": 5, "type": "int", "strategy": "group"}}, "`num_bits`"),
        ({"weights": {"num_bits": 4, "type": "int", "strategy": "block"}}, "`strategy`"),
        (
            {"weights": {"num_bits": 4, "type": "int", "strategy": "group"}, "input_activations": {"num_bits": 8}},
            "`input_",
        ),
    ],
    ids=["float", "5-bits", "blocks", "activations"],
)
def test_schemes_of_compressed_tensors_that_mean_something_else_are_refused(
    group: dict[str, Any], match: str, exported: Callable[..., Any], tmp_path: Path
) -> None:
    import shutil

    copy = Path(shutil.copytree(exported("compressed-tensors", "llama", bits=4).source, tmp_path / "copy"))
    f.edit(copy, {}, config_groups={"group_0": group})
    with pytest.raises(ForeignModelError, match=match):
        import_model(copy)


def test_a_minimum_between_two_steps_is_refused(base: Path, tmp_path: Path) -> None:
    from tests.importing.test_foreign_writers import write_gguf

    kind = gguf.GGMLQuantizationType.Q4_1
    write_gguf(base, tmp_path / "model.gguf", "Q4_1", lambda array: gguf.quants.quantize(array, kind))
    with pytest.raises(ForeignModelError, match=r"every minimum of Q4_1 must be a multiple of its step.*Q4_0"):
        import_model(tmp_path / "model.gguf")


def test_blocks_that_run_over_rows_are_refused(tmp_path: Path, bases: Path) -> None:
    from bitsandbytes.functional import quantize_4bit

    odd = save_base("llama-172", bases)
    original = load(odd)
    layers = {name: tuple(m.weight.shape) for name, m in original.named_modules() if name in f.LAYERS}

    def compress(layer: str) -> f.Tensors:
        data, state = quantize_4bit(original.get_submodule(layer).weight.detach(), blocksize=64, quant_type="nf4")
        return {"weight": data, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}

    assert layers[f.DOWN] == (64, 172)
    section = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
    folder = f.write_folder(odd, tmp_path / "nf4", section, compress)
    with pytest.raises(ForeignModelError, match="blocks of 64 weights must divide the rows of 172"):
        import_model(folder)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"bits": 2}, "`bits` must be left to the checkpoint"),
        ({"group_size": 64}, "`group_size` must be left"),
        ({"overrides": {}}, "`overrides` must be left"),
        ({"learn_scale": False}, "scale_learning_rate=0"),
        ({"grid": "nf"}, "`grid` must hold the codes.*'int': got grid='nf'"),
        ({"scale_dtype": "bfloat16"}, "would round them"),
        ({"dtype": "int8"}, "`dtype` must be 'auto' or one of"),
        ({"exclude_modules": r".*"}, "`exclude_modules` must leave a layer"),
    ],
    ids=str,
)
def test_settings_that_the_checkpoint_determines_are_refused(
    settings: dict[str, Any], match: str, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=match):
        import_model(folder, **settings)
    with pytest.raises(UnknownNameError, match="Did you mean 'learn_zero_point'"):
        import_model(folder, learn_zeropoint=True)


def test_another_base_is_refused(folder: Path, bases: Path) -> None:
    with pytest.raises(ForeignModelError, match=r"`base` must be the model that was quantized: got model_type='qwen2'"):
        import_model(folder, save_base("qwen2", bases))
    with pytest.raises(
        ForeignModelError, match=r"layer 'model.layers.0.mlp.down_proj' is \(64, 172\), and \(64, 128\)"
    ):
        import_model(folder, save_base("llama-172", bases))


def test_norms_that_the_tool_changed_are_the_students_own(folder: Path, base: Path) -> None:
    """AWQ folds its scaling into norms: the teacher keeps those of the base."""
    norm = "model.layers.1.post_attention_layernorm"
    f.edit(folder, {f"{norm}.weight": torch.linspace(0.5, 1.5, 64)})
    student = import_model(folder, base).eval()
    assert student.peft_config["default"].modules_to_save == [norm]
    alone = import_model(folder).eval()
    assert torch.equal(logits(student), logits(alone))
    with student.disable_adapter():
        assert torch.equal(logits(student), logits(load(base)))


def test_what_cannot_be_held_twice_sends_the_base_to_the_trainer(bases: Path, exported: Callable[..., Any]) -> None:
    found = exported("gptq", "qwen2", bits=3)
    base = load(found.base)
    base.model.layers[0].self_attn.q_proj.bias.data += 1
    with pytest.raises(ForeignModelError, match=r"q_proj.bias.*belongs to a quantized layer.*teacher=base"):
        import_model(found.source, base)
    found = exported("compressed-tensors", "llama-tied", bits=4)
    base = load(found.base)
    base.model.embed_tokens.weight.data += 1
    with pytest.raises(ForeignModelError, match=r"embed_tokens.weight.*is tied.*teacher=base"):
        import_model(found.source, base)


def test_the_bases_own_values_in_another_dtype_are_shared(folder: Path, base: Path) -> None:
    plain = {n: t.half() for n, t in load_file(folder / f.WEIGHTS).items() if t.dtype == torch.float32}
    f.edit(folder, plain)
    student = import_model(folder, base).eval()
    assert student.peft_config["default"].modules_to_save is None
    with student.disable_adapter():
        assert torch.equal(logits(student), logits(load(base)))


def test_names_must_be_those_of_the_model(folder: Path, generator: torch.Generator) -> None:
    with pytest.raises(CheckpointError, match=r"place for tensor 'model.layers.0.mlp.act.scales'"):
        import_model(f.edit(folder, {"model.layers.0.mlp.act.scales": torch.ones(4)}))
    f.edit(folder, {"model.layers.0.mlp.act.scales": None, f"{f.DOWN}.bias": torch.ones(64)})
    with pytest.raises(CheckpointError, match=r"down_proj\.bias"):
        import_model(folder)
    f.edit(folder, {f"{f.DOWN}.bias": None, "model.norm.weight": None})
    with pytest.raises(CheckpointError, match=r"must hold tensor 'model\.norm\.weight'"):
        import_model(folder)
    experts = {f"model.layers.0.experts.0.w1.{k}": v for k, v in f.gptq(f.draw((64, 64), 4, generator), 4).items()}
    with pytest.raises(ForeignModelError, match=r"'model\.layers\.0\.experts\.0\.w1' is none\. Experts"):
        import_model(f.edit(folder, {**experts, "model.norm.weight": torch.ones(64)}))


def test_sources_that_are_none(base: Path, tmp_path: Path, folder: Path, bases: Path) -> None:
    with pytest.raises(ForeignModelError, match=r"without `quantization_config`.*get_bitdistiller_model"):
        import_model(base)
    with pytest.raises(ConfigError, match=r"`source` must be a folder or a \.gguf file"):
        import_model("./nowhere")
    with pytest.raises(ConfigError, match="or a name on the Hub that can be read"):
        import_model("someone/nothing")
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(ForeignModelError, match=r"Pickles and single weight files are not read"):
        import_model(tmp_path / "model.pt")
    make_packed("llama", bases, steps=0).save_pretrained(tmp_path / "ours")
    with pytest.raises(ForeignModelError, match="got a model of this library"):
        import_model(tmp_path / "ours")
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "a.gguf").touch()
    with pytest.raises(ForeignModelError, match=r"must name the file.*a\.gguf"):
        import_model(tmp_path / "ggufs")


def test_the_configs_of_older_releases_are_read(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    section = config.pop("quantization_config")
    del section["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(section))
    assert import_model(folder).peft_config["default"].bits == 4


def test_turned_and_empty_groups_keep_their_values(generator: torch.Generator) -> None:
    weight = f.draw((4, 64), 4, generator)
    scale = weight.scale.clone()
    scale[0], scale[1, 0] = -scale[0], 0.0
    found = affine_weight(weight.codes, scale, weight.zero_point, bits=4)
    assert torch.equal(found.dense(), weight._replace(scale=scale).dense())
    assert float(found.params.scale.min()) > 0


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_scales_that_are_no_numbers_are_refused(scale: float, folder: Path) -> None:
    scales = load_file(folder / f.WEIGHTS)[f"{f.DOWN}.scales"]
    scales[0, 0] = scale
    with pytest.raises(ForeignModelError, match="scales must be finite"):
        import_model(f.edit(folder, {f"{f.DOWN}.scales": scales}))


def test_values_that_are_no_numbers_are_refused(folder: Path) -> None:
    with pytest.raises(ForeignModelError, match=r"'model.norm.weight' must be finite"):
        import_model(f.edit(folder, {"model.norm.weight": torch.full((64,), torch.nan)}))


def test_outsiders_add_formats_under_new_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_module, "_FORMATS", dict(formats_module._FORMATS))
    known = get_import_format("gptq")
    with pytest.raises(ConfigError, match="`name` must be new"):
        register_import_format(known)
    register_import_format(ImportFormat("mine", "nobody", known.open))
    assert "mine" in import_format_names()
    with pytest.raises(UnknownNameError, match="Did you mean 'gguf'"):
        get_import_format("ggfu")
    monkeypatch.setattr(formats_module, "find_spec", lambda name: None)
    with pytest.raises(ForeignModelError, match="pip install gguf"):
        get_import_format("gguf").check_installed()
