"""What our exporter writes comes back with the very codes, trains, and packs to what it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitdistiller_peft import import_model
from bitdistiller_peft.export import PackedSource
from bitdistiller_peft.layers import companion, quantized
from tests.hub.models import logits
from tests.tiny import load, token_ids

CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("gptq", "llama", {"bits": 2}, {}),
    ("gptq", "qwen2", {"bits": 3}, {}),
    ("gptq", "llama", {"bits": 4, "grid": "int_sym"}, {"version": 1}),
    ("gptq", "opt", {"bits": 8, "group_size": -1}, {}),
    ("awq", "llama", {"bits": 4}, {}),
    ("compressed-tensors", "qwen2", {"bits": 3}, {}),
    ("compressed-tensors", "llama-tied", {"bits": 4, "grid": "int_sym"}, {}),
    ("compressed-tensors", "llama-172", {"bits": 3, "group_size": -1}, {}),
    ("compressed-tensors", "llama", {"bits": 2, "overrides": {"down_proj": {"bits": 4}}}, {}),
    ("gguf", "llama", {"bits": 2, "group_size": 64, "zero_point_range": (1, 2)}, {}),
    ("gguf", "qwen2", {"bits": 4, "grid": "int_sym"}, {}),
    ("gguf", "llama-tied", {"bits": 8, "grid": "int_sym"}, {}),
    ("gguf", "llama", {"bits": 2, "zero_point_range": (1, 2)}, {"carrier": "Q4_1"}),
]
each_case = pytest.mark.parametrize(
    ("format", "arch", "settings", "options"),
    CASES,
    ids=["-".join([c[0], c[1], *(f"{k}={v}" for k, v in (c[2] | c[3]).items())]) for c in CASES],
)


@each_case
def test_codes_come_back_and_pack_at_once(
    format: str,
    arch: str,
    settings: dict[str, Any],
    options: dict[str, Any],
    exported: Callable[..., Any],
    tmp_path: Path,
) -> None:
    found = exported(format, arch, options=options, **settings)
    student = import_model(found.source)
    source = PackedSource(found.packed)
    for name in source.quantized_names:
        layer = student.base_model.model.get_submodule(name.removesuffix(".weight"))
        shown = layer.student("weight", "default")
        assert torch.equal(shown().detach(), source.weight(name).dense())
        assert shown.weight.requires_grad
        assert companion(shown, "weight", "_scale").requires_grad
    student.pack_and_unload(progressbar=False).save_pretrained(tmp_path / "again")
    again = PackedSource(tmp_path / "again")
    assert again.quantized_names == source.quantized_names
    for name in source.quantized_names:
        ours, theirs = again.weight(name), source.weight(name)
        assert torch.equal(ours.dense(), theirs.dense())
        if format != "gguf":  # whose blocks are smaller groups, and turned round where the step is negative
            assert torch.equal(ours.codes, theirs.codes)
            assert torch.equal(ours.params.scale, theirs.params.scale)
    assert torch.equal(logits(load(tmp_path / "again")), logits(load(found.packed)))


def test_training_moves_codes_and_scales_of_an_imported_model(exported: Callable[..., Any]) -> None:
    student = import_model(exported("gptq", "llama", bits=4, grid="int_sym").source)
    layer = student.base_model.model.get_submodule("model.layers.1.mlp.down_proj").student("weight", "default")
    before, scale = quantized(layer, "weight")[0], companion(layer, "weight", "_scale").detach().clone()
    ids = token_ids()
    student.train()
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.5)
    for step in range(2):
        student(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(quantized(layer, "weight")[0], before), step
    # weights in the middle between two roundings say nothing about the scale; after the first step they do
    assert not torch.equal(companion(layer, "weight", "_scale"), scale)
    student.pack_and_unload(progressbar=False)


def test_the_base_is_the_exact_teacher(exported: Callable[..., Any]) -> None:
    found = exported("gptq", "qwen2", bits=3)
    student = import_model(found.source, base=found.base).eval()
    with student.disable_adapter():
        assert torch.equal(logits(student), logits(load(found.base)))
    assert torch.equal(logits(student), logits(load(found.packed)))
    loaded = import_model(found.source, base=load(found.base)).eval()
    assert torch.equal(logits(loaded), logits(student))


def test_without_a_base_the_dequantized_model_stands_under_the_student(exported: Callable[..., Any]) -> None:
    student = import_model(exported("awq", "llama", bits=4).source).eval()
    with student.disable_adapter():
        dequantized = logits(student)
    torch.testing.assert_close(logits(student), dequantized)


def test_it_says_where_it_comes_from_and_saves_like_any_adapter(exported: Callable[..., Any], tmp_path: Path) -> None:
    from peft import PeftModel

    found = exported("compressed-tensors", "qwen2", bits=3)
    student = import_model(found.source, base=found.base).eval()
    student.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(found.base), str(tmp_path)).eval()
    assert torch.equal(logits(again), logits(student))
    noted = student.peft_config["default"].provenance
    assert noted == {"imported_from": "out", "imported_format": "compressed-tensors"}
    packed = again.pack_and_unload(progressbar=False)
    assert packed.config.quantization_config.provenance["imported_format"] == "compressed-tensors"


def test_settings_that_the_checkpoint_leaves_open_are_ours(exported: Callable[..., Any]) -> None:
    found = exported("gptq", "llama", bits=4, grid="int_sym")
    student = import_model(found.source, grid="int", learn_zero_point=True, scale_dtype="float32", train_other="norms")
    config = student.peft_config["default"]
    assert (config.grid, config.bits, config.scale_dtype, config.learn_zero_point) == ("int", 4, "float32", True)
    layer = student.base_model.model.get_submodule("model.layers.0.mlp.up_proj").student("weight", "default")
    assert torch.equal(layer().detach(), PackedSource(found.packed).weight("model.layers.0.mlp.up_proj.weight").dense())
    assert companion(layer, "weight", "_zero_point").requires_grad


@pytest.mark.parametrize("with_base", [False, True])
def test_excluded_layers_stay_dequantized(with_base: bool, exported: Callable[..., Any]) -> None:
    found = exported("awq", "llama", bits=4)
    base = found.base if with_base else None
    student = import_model(found.source, base=base, exclude_modules=["down_proj"]).eval()
    torch.testing.assert_close(logits(student), logits(load(found.packed)))
    packed = student.pack_and_unload(progressbar=False)
    assert "model.layers.0.mlp.down_proj" in packed.config.quantization_config.modules_to_not_convert


def test_a_dtype_can_be_asked_for(exported: Callable[..., Any]) -> None:
    student = import_model(exported("awq", "llama", bits=4).source, dtype="bfloat16")
    model = student.base_model.model
    assert model.lm_head.weight.dtype == torch.bfloat16
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    assert (layer.base_layer.weight.dtype, layer.student("weight", "default").weight.dtype) == (
        torch.bfloat16,
        torch.float32,
    )
