"""Embedding and head as low-bit tables: trained, packed, saved and loaded like layers, and one tensor where tied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from torch import nn

from bitdistiller_peft import BitDistillerConfig, BitDistillerQuantConfig, calibrate, get_bitdistiller_model
from bitdistiller_peft.errors import ConfigError, TargetError
from bitdistiller_peft.export.source import PackedSource
from bitdistiller_peft.hub import quant_summary
from bitdistiller_peft.hub.file_size import packed_file_bytes
from bitdistiller_peft.layers import PackedEmbedding, PackedLinear, quant_specs
from bitdistiller_peft.training.heads import output_head
from tests.tiny import load, token_ids
from tests.tuner.common import Bases, logits, overlays, teacher_logits, train, trainable

UNTIED = {"embedding_bits": 4, "head_bits": 8}
TIED = {"embedding_bits": 8}
CASES = {"llama": UNTIED, "llama-tied": TIED, "gemma3": TIED, "gpt2": TIED, "opt": TIED}
each = pytest.mark.parametrize(("name", "tables"), CASES.items())


def trained(bases: Bases, name: str, tables: dict[str, int], **kwargs: object) -> PeftModel:
    student = bases.student(name, **{**tables, **kwargs})
    train(student, lr=1e-3)
    return student


@each
def test_tables_are_trained_packed_saved_and_loaded(
    name: str, tables: dict[str, int], bases: Bases, tmp_path: Path
) -> None:
    student = trained(bases, name, tables)
    expected, latent = logits(student), quant_summary(student)
    assert not torch.equal(expected, teacher_logits(student))
    packed = student.pack_and_unload(progressbar=False)
    assert torch.equal(logits(packed), expected)
    packed.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert isinstance(loaded.get_input_embeddings(), PackedEmbedding)
    assert isinstance(loaded.get_output_embeddings(), PackedLinear)
    assert loaded.dtype == torch.float32  # not that of the scales, which come first
    summary = quant_summary(loaded).with_files(tmp_path)
    assert summary.rows == quant_summary(packed).rows
    assert summary.num_bytes == latent.num_bytes
    assert {row.bits for row in summary.rows if row.state == "packed"} == {2, *tables.values()}
    assert sum(part.stored_bits for part in summary.parts) == 8 * (tmp_path / "model.safetensors").stat().st_size
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@each
def test_the_size_of_the_file_is_known_before(name: str, tables: dict[str, int], bases: Bases, tmp_path: Path) -> None:
    base, student = bases.base(name), bases.student(name, **tables)
    packed = student.pack_and_unload(progressbar=False)
    specs = {n: quant_specs(m)["weight"] for n, m in packed.named_modules() if quant_specs(m)}
    if "head_bits" not in tables:
        specs.pop(next(n for n, m in packed.named_modules() if m is packed.get_output_embeddings()))
    packed.save_pretrained(tmp_path)
    assert packed_file_bytes(base, specs) == (tmp_path / "model.safetensors").stat().st_size


def test_a_tied_table_is_one_tensor(bases: Bases, tmp_path: Path) -> None:
    student = trained(bases, "llama-tied", TIED)
    assert sum("embed_tokens" in key or "lm_head" in key for key in trainable(student)) == 2  # weight and scale, once
    student.save_pretrained(tmp_path / "adapter")
    with safe_open(tmp_path / "adapter/adapter_model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "lm_head" in key]  # noqa: SIM118
    packed = student.pack_and_unload(progressbar=False)
    packed.save_pretrained(tmp_path / "packed")
    with safe_open(tmp_path / "packed/model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "lm_head" in key]  # noqa: SIM118
    for model in (packed, load(tmp_path / "packed")):
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        for name in ("weight", "weight_scale", "weight_zero_point"):
            assert getattr(table, name) is getattr(head, name)


def test_the_gradient_of_a_tied_table_comes_from_both_ends(bases: Bases) -> None:
    student = bases.student("llama-tied", **TIED)
    table = overlays(student)["model.embed_tokens"].active_student("weight").weight
    student(token_ids()).logits.square().sum().backward()
    absent = sorted(set(range(table.shape[0])) - set(token_ids().flatten().tolist()))
    assert table.grad[absent].abs().sum() > 0  # through the head alone
    embedded = student.get_input_embeddings()(token_ids())
    table.grad = None
    embedded.square().sum().backward()
    assert table.grad[absent].abs().sum() == 0
    assert table.grad[token_ids()].abs().sum() > 0


def test_the_loss_sees_the_quantized_head(bases: Bases) -> None:
    for name, tables in (("llama", UNTIED), ("llama-tied", TIED)):
        student = trained(bases, name, tables)
        expected = overlays(student)["model.embed_tokens" if name != "llama" else "lm_head"].active_student("weight")()
        assert torch.equal(output_head(student.base_model.model).weight, expected)
        with student.disable_adapter():
            head = student.get_output_embeddings().base_layer.weight
            assert torch.equal(output_head(student.base_model.model).weight, head)


@each
def test_adapters_with_tables_load_again(name: str, tables: dict[str, int], bases: Bases, tmp_path: Path) -> None:
    student = trained(bases, name, tables)
    student.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(bases.base(name), tmp_path)
    assert torch.equal(logits(again), logits(student))


@each
def test_merging_and_unloading(name: str, tables: dict[str, int], bases: Bases) -> None:
    base = logits(bases.base(name))
    student = trained(bases, name, tables)
    expected = logits(student)
    assert torch.equal(teacher_logits(student), base)
    student.merge_adapter()
    assert torch.equal(logits(student), expected)
    student.unmerge_adapter()
    assert torch.equal(teacher_logits(student), base)
    assert torch.equal(logits(student), expected)
    assert torch.equal(logits(student.merge_and_unload()), expected)
    assert torch.equal(logits(trained(bases, name, tables).unload()), base)


def test_a_second_adapter_may_leave_the_tables_alone(bases: Bases) -> None:
    student = trained(bases, "llama-tied", TIED)
    first = logits(student)
    student.add_adapter("plain", BitDistillerConfig(bits=2, group_size=32))
    student.set_adapter("plain")
    layers_alone = bases.student("llama-tied")
    assert torch.equal(logits(student), logits(layers_alone))
    student.set_adapter("default")
    assert torch.equal(logits(student), first)


@pytest.mark.parametrize("method", ["clip", "gptq", "blockwise", "awq"])
def test_tables_are_calibrated_by_their_rows(method: str, bases: Bases) -> None:
    student = bases.student("llama-tied", embedding_bits=4)
    table = overlays(student)["model.embed_tokens"].active_student("weight")
    before = float((table() - table.weight).detach().square().sum())
    ids = token_ids(4, 16)
    result = calibrate(student, None, ids, method=method, show_progress=False)
    after = float((table() - table.weight).detach().square().sum())
    assert after < before
    assert "model.embed_tokens.weight" in {report.name for report in result.layers}


def test_a_cast_changes_the_rows_and_no_scale(bases: Bases) -> None:
    packed = trained(bases, "llama", UNTIED).pack_and_unload(progressbar=False)
    table = packed.get_input_embeddings()
    expected, scale = table.dequantize(torch.bfloat16), table.weight_scale.clone()
    packed.to(torch.bfloat16)
    assert torch.equal(table.weight_scale, scale)
    assert table.weight_scale.dtype == torch.float16
    assert packed.dtype == torch.bfloat16
    assert torch.equal(table(token_ids()), expected[token_ids()])


def test_full_precision_models_are_quantized_on_loading(bases: Bases) -> None:
    config = BitDistillerQuantConfig(
        bits=2, group_size=32, embeddings=["model.embed_tokens"], overrides={"model.embed_tokens": {"bits": 4}}
    )
    loaded = load(bases.path("llama-tied"), quantization_config=config)
    expected = bases.student("llama-tied", embedding_bits=4)
    assert torch.equal(logits(loaded), logits(expected))


def test_exports_get_the_rows_that_the_model_looks_up(bases: Bases, tmp_path: Path) -> None:
    packed = trained(bases, "llama-tied", TIED).pack_and_unload(progressbar=False)
    packed.save_pretrained(tmp_path)
    source = PackedSource(tmp_path)
    assert "model.embed_tokens.weight" not in source.quantized_names
    found = dict(source.plain())
    assert torch.equal(found["model.embed_tokens.weight"], packed.get_input_embeddings().dequantize())
    assert not [name for name in found if "weight_rows" in name]


def test_trained_beside_norms(bases: Bases) -> None:
    student = bases.student("llama-tied", train_other="all", **TIED)
    names = trainable(student)
    assert any("norm" in name for name in names)
    assert not any("modules_to_save" in name and ("embed" in name or "lm_head" in name) for name in names)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embedding_bits": 5}, "embedding_bits=5"),
        ({"head_bits": True}, "head_bits=True"),
        ({"head_bits": 8, "subln": "all"}, "subln='all'"),
        ({"head_bits": 8, "activation_bits": 8}, "activation_bits=8"),
    ],
)
def test_widths_that_cannot_be(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BitDistillerConfig(bits=2, group_size=32, **kwargs)


def test_tied_tables_have_one_width(bases: Bases) -> None:
    with pytest.raises(ConfigError, match="embedding_bits=4, head_bits=8"):
        bases.student("llama-tied", embedding_bits=4, head_bits=8)
    first, second = (
        get_bitdistiller_model(bases.base("llama-tied"), config)
        for config in (
            BitDistillerConfig(bits=2, group_size=32, head_bits=8),
            BitDistillerConfig(bits=2, group_size=32, embedding_bits=8),
        )
    )
    assert torch.equal(logits(first), logits(second))


def test_engines_take_no_packed_head_of_its_own(bases: Bases) -> None:
    with pytest.raises(ConfigError, match="target='vllm'"):
        bases.student("llama", target="vllm", **UNTIED)
    bases.student("llama-tied", target="vllm", **TIED)


def test_models_without_tables_are_refused() -> None:
    with pytest.raises(TargetError, match="embedding"):
        get_bitdistiller_model(nn.Sequential(nn.Linear(32, 32)), BitDistillerConfig(group_size=32, embedding_bits=8))


@pytest.mark.parametrize("names", [["model.norm"], ["model.embed_tokens"] * 2, ["model.embed_tokens", "embed_tokens"]])
def test_names_that_are_no_embeddings_are_refused(names: list[str], bases: Bases) -> None:
    config = BitDistillerQuantConfig(bits=2, group_size=32, embeddings=names)
    with pytest.raises(TargetError, match="each once"):
        load(bases.path("llama"), quantization_config=config)
