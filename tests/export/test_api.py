"""What cannot be exported exactly is refused before anything is written, with the reason and what would do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitdistiller_peft import BitDistillerConfig, export_model, get_bitdistiller_model, verify_export
from bitdistiller_peft.errors import ConfigError, ExportError, StateError, UnknownNameError
from bitdistiller_peft.export import (
    ExportFormat,
    ForeignTensor,
    ForeignWeight,
    PackedSource,
    get_export_format,
    register_export_format,
    transformers_engine,
)
from bitdistiller_peft.export import formats as formats_module
from bitdistiller_peft.export.logits import compare_logits
from bitdistiller_peft.export.source import open_source
from tests.tiny import load, save_base

Packed = Callable[..., Path]


@pytest.mark.parametrize(
    ("format", "options", "arch", "model", "reason", "nearest"),
    [
        (
            "compressed-tensors",
            {},
            "llama",
            {"grid": "nf", "bits": 3},
            "grid 'nf' is not scale",
            "'gguf', output_dir, carrier='F16'",
        ),
        ("compressed-tensors", {}, "gpt2", {"bits": 2}, "c_attn': it is a Conv1D", "'onnx'"),
        ("compressed-tensors", {"widen_to": 4}, "llama", {"bits": 8}, "8-bit codes do not fit", "'compressed-tensors'"),
        ("gguf", {}, "gpt2", {"bits": 2}, "architecture 'GPT2LMHeadModel'", "'onnx'"),
        (
            "gguf",
            {},
            "llama",
            {"bits": 3, "group_size": 16},
            "groups of 16 weights",
            "'gguf', output_dir, carrier='F16'",
        ),
        ("gguf", {"carrier": "Q2_0"}, "llama", {"bits": 3, "group_size": 64}, "outside of what Q2_0", "'gguf'"),
        ("gptq", {}, "llama-172", {"bits": 2, "group_size": 4}, "not multiples of 32", "'compressed-tensors'"),
        ("gptq", {}, "llama", {"bits": 2, "overrides": {"down_proj": {"bits": 4}}}, "must serve all layers", "'comp"),
        ("awq", {}, "llama", {"bits": 8}, "8-bit codes do not fit into 4 bits", "'compressed-tensors'"),
        ("mlx", {}, "llama", {"bits": 2, "group_size": 16}, "groups of 16 weights", "'compressed-tensors'"),
        ("bitnet", {}, "llama", {"bits": 2}, "activation_bits=None", "'compressed-tensors'"),
        ("onnx", {}, "llama", {"bits": 3}, "3-bit codes are none", "'onnx', output_dir, widen_to=4"),
        ("onnx", {}, "llama", {"bits": 2, "group_size": 8}, "not made of blocks of 16", "'compressed-tensors'"),
        ("onnx", {}, "llama", {"grid": "int_fine", "bits": 8, "group_size": 16}, "no zeros between the codes", ""),
        ("onnx", {"widen_to": 8}, "llama", {"grid": "r2q", "tied": True, "group_size": 16}, "no zeros between", ""),
        ("onnx", {"widen_to": 4}, "llama", {"bits": 8}, "8-bit codes do not fit into 4 bits", "'onnx'"),
        ("onnx", {}, "llama", {"grid": "r2q", "bits": 2}, "grid 'r2q' is not scale", "'gguf', output_dir, carrier="),
        ("onnx", {}, "mixtral", {"bits": 2}, "architecture 'MixtralForCausalLM'", "'compressed-tensors'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_names_the_layer_the_reason_and_the_nearest_format(
    format: str,
    options: dict[str, Any],
    arch: str,
    model: dict[str, Any],
    reason: str,
    nearest: str,
    packed: Packed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(formats_module, "find_spec", lambda name: None)  # refused whatever is installed
    with pytest.raises(ExportError) as caught:
        export_model(packed(arch, **model), format, tmp_path / "out", **options)
    message = str(caught.value)
    assert reason in message
    assert f"The nearest format that can: export_model(model, {nearest}" in message
    assert not list(tmp_path.iterdir())


def test_the_nearest_format_does_hold_the_model(packed: Packed, tmp_path: Path) -> None:
    folder = packed("llama", bits=3, group_size=16)
    report = export_model(folder, "gguf", tmp_path / "out", carrier="F16")
    assert report.verification.num_codes == 0


@pytest.mark.parametrize("settings", [{"activation_bits": 8}, {"subln": "output"}], ids=str)
def test_what_changes_the_inputs_of_layers_is_refused(settings: dict[str, Any], packed: Packed, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"No other format can either; keep the packed checkpoint"):
        export_model(packed("llama", bits=2, **settings), "dequantized", tmp_path / "out")


def test_names_and_options_are_checked(packed: Packed, tmp_path: Path) -> None:
    folder = packed("llama", bits=2)
    with pytest.raises(UnknownNameError, match="Did you mean 'gguf'"):
        export_model(folder, "ggfu", tmp_path / "out")
    with pytest.raises(UnknownNameError, match="Did you mean 'widen_to'"):
        export_model(folder, "compressed-tensors", tmp_path / "out", widen=4)
    with pytest.raises(ConfigError, match=r"`widen_to` must be one of \[None, 4, 8\]"):
        export_model(folder, "compressed-tensors", tmp_path / "out", widen_to=5)


def test_a_folder_with_something_in_it_is_left_alone(packed: Packed, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="`output_dir` must be an empty folder"):
        export_model(packed("llama", bits=2), "dequantized", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_only_packed_models_are_exported(packed: Packed, tmp_path: Path) -> None:
    base = save_base("llama", tmp_path)
    with pytest.raises(StateError, match="without such a quantization_config"):
        export_model(base, "dequantized", tmp_path / "out")
    student = get_bitdistiller_model(load(base), BitDistillerConfig(bits=2, group_size=32))
    with pytest.raises(StateError, match="pack_and_unload"):
        export_model(student, "dequantized", tmp_path / "out")
    with pytest.raises(StateError, match="must be packed"):
        export_model(load(base), "dequantized", tmp_path / "out")


def test_another_model_is_told_apart(packed: Packed, tmp_path: Path) -> None:
    export_model(packed("llama", bits=2), "compressed-tensors", tmp_path / "out")
    with pytest.raises(ExportError, match="must equal the packed model's"):
        verify_export(packed("llama", bits=2, zero_point_range=(1, 2)), tmp_path / "out", "compressed-tensors")
    with pytest.raises(ExportError, match=r"must be able to read|must hold"):
        verify_export(packed("llama", bits=2), tmp_path / "out", "gguf")


def test_a_tokenizer_goes_along(with_tokenizer: Path, packed: Packed, tmp_path: Path) -> None:
    from tests.standin import tokenizer

    export_model(with_tokenizer, "dequantized", tmp_path / "a")
    export_model(packed("llama", bits=2), "dequantized", tmp_path / "b", tokenizer=tokenizer())
    assert (tmp_path / "a" / "tokenizer.json").exists()
    assert (tmp_path / "b" / "tokenizer.json").exists()


def test_a_missing_package_is_named(packed: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_module, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'bitdistiller_peft\[export\]'"):
        export_model(packed("llama", bits=2), "gguf", tmp_path / "out")


def test_outsiders_add_formats_under_new_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_module, "_FORMATS", dict(formats_module._FORMATS))
    known = formats_module.get_export_format("dequantized")
    with pytest.raises(ConfigError, match="`name` must be new"):
        register_export_format(known)
    register_export_format(ExportFormat("mine", "nobody", known.refuse_weight, known.write, known.read))
    assert formats_module.export_format_names()[-1] == "mine"


def test_a_residual_scale_that_is_subnormal_or_zero_is_exported(tmp_path: Path) -> None:
    """Groups of one magnitude leave a residual of next to nothing; it is stored, and means what it says."""
    base = load(save_base("llama", tmp_path))
    for name, parameter in base.named_parameters():
        if name.endswith("o_proj.weight"):
            parameter.data.copy_(0.0156 * torch.where(parameter >= 0, 1.0, -1.0))
            parameter.data[0] = 2**-6  # a number of fp16: nothing is left
    model = get_bitdistiller_model(base, BitDistillerConfig(grid="r2q", group_size=32))
    packed = model.pack_and_unload(progressbar=False)
    layer = packed.model.layers[0].self_attn.o_proj
    residual = layer.weight_scale_residual
    assert float(residual[0].max()) == 0.0 < float(residual[1].max()) < torch.finfo(torch.float16).tiny
    packed.save_pretrained(tmp_path / "packed")
    export_model(tmp_path / "packed", "dequantized", tmp_path / "out")
    verify_export(tmp_path / "packed", tmp_path / "out", "dequantized")
    assert torch.equal(load(tmp_path / "out").model.layers[0].self_attn.o_proj.weight, layer.dequantize())


def test_values_in_the_wrong_place_are_seen_by_the_logits(packed: Packed, tmp_path: Path) -> None:
    """Each number is right, but stands under another layer's name, which a comparison by name may share."""
    source = packed("llama", bits=2)
    folder = export_model(source, "compressed-tensors", tmp_path / "out").folder
    known = get_export_format("compressed-tensors")

    def swapped(source: PackedSource, folder: Path) -> Iterator[ForeignWeight | ForeignTensor]:
        names = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        for found in known.read(source, folder):
            layer = found.name.split(".")[-2]
            yield replace(found, name=found.name.replace(layer, names.get(layer, layer)))

    with open_source(source) as opened:
        assert compare_logits(opened, folder, known).difference < 1e-3
        with pytest.raises(ExportError, match=r"must differ from the packed model's by at most 3.9e-03: they differ"):
            compare_logits(opened, folder, replace(known, read=swapped))


def test_the_logits_of_an_engine_are_compared_too(packed: Packed, tmp_path: Path) -> None:
    source = packed("llama", bits=2)
    folder = export_model(source, "dequantized", tmp_path / "out").folder
    report = verify_export(source, folder, "dequantized", engine=transformers_engine)
    assert [found.difference for found in report.logits] == [0, 0]
    assert "logits by transformers_engine differ by 0.0e+00 (at most 5.0e-02)" in str(report)
    assert verify_export(source, folder, "dequantized", logits=False).logits == ()

    def broken(folder: Path, ids: Tensor) -> Tensor:
        return transformers_engine(folder, ids.flip(0))

    with pytest.raises(ExportError, match=r"logits by broken must differ .* by at most 5.0e-02"):
        verify_export(source, folder, "dequantized", logits=False, engine=broken)
    with pytest.raises(ExportError, match="must have shape"):
        verify_export(source, folder, "dequantized", engine=lambda folder, ids: broken(folder, ids)[:1])
