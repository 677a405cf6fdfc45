"""The true number of bits per weight is what the saved file takes, to the last bit, before and after packing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitdistiller_peft import BitDistillerConfig, BitDistillerQuantConfig, print_quant_summary, quant_summary
from bitdistiller_peft.hub.manifest import read_header
from bitdistiller_peft.kernels import backend_info
from tests.hub.models import WEIGHTS, Saved, make_student
from tests.tiny import CONFIGS, load, save_base

GetSaved = Callable[..., Saved]


def file_bytes(folder: Path) -> int:
    """Bytes of all tensors, by the headers of the files."""
    entries = [entry for file in folder.glob("*.safetensors") for entry in read_header(file)[0].values()]
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries)


def num_weights(base: Path) -> int:
    """Weights of a full-precision model, each tied one once."""
    return sum(tensor.numel() for tensor in load_file(base / WEIGHTS).values())


def check(model: torch.nn.Module, folder: Path, base: Path) -> None:
    """The summary of a model, whatever its state, is that of its packed file."""
    summary = quant_summary(model)
    assert summary.num_bytes == file_bytes(folder)
    assert summary.bits_per_weight == file_bytes(folder) * 8 / num_weights(base)


@pytest.mark.parametrize("arch", CONFIGS)
@pytest.mark.parametrize(
    "settings",
    [
        {"group_size": -1},
        {"bits": 3, "grid": "nf", "group_size": 4},
        {"grid": "ternary", "group_size": 4},
        {"grid": "r2q", "group_size": 4},
    ],
    ids=str,
)
def test_student_and_packed_model_are_counted_as_the_file_is(
    bases: Path, arch: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    base = save_base(arch, bases)
    student = make_student(arch, bases, steps=0, scale_dtype="float32", **settings)
    before = quant_summary(student)
    packed = student.pack_and_unload(progressbar=False)
    packed.save_pretrained(tmp_path)
    assert before.bits_per_weight == quant_summary(packed).bits_per_weight
    assert before.num_bytes == file_bytes(tmp_path)
    check(packed, tmp_path, base)
    check(load(tmp_path), tmp_path, base)
    assert {row.state for row in before.rows} == {"latent", "full precision"}
    assert {row.state for row in quant_summary(packed).rows} == {"packed", "full precision"}


def test_each_row_is_what_its_tensors_take(saved: GetSaved) -> None:
    original = saved("llama-172", bits=3, group_size=-1, overrides={"down_proj": {"bits": 4, "group_size": 43}})
    tensors = load_file(original.folder / WEIGHTS)
    down = {name: tensor for name, tensor in tensors.items() if "down_proj" in name}
    other = {name: t for name, t in tensors.items() if "_proj" in name and name not in down}
    rest = {name: tensor for name, tensor in tensors.items() if "_proj" not in name}
    rows = {(row.kind, row.bits): row for row in quant_summary(original.model).rows}
    assert rows.keys() == {("int", 3), ("int", 4), ("float32", 32)}
    for key, mine, modules, weights in (
        (("int", 4), down, 2, 2 * 64 * 172),
        (("int", 3), other, 12, 2 * (2 * 64 * 64 + 2 * 32 * 64 + 2 * 172 * 64)),
        (("float32", 32), rest, 7, 2 * 96 * 64 + 5 * 64),
    ):
        assert rows[key].stored_bits == sum(tensor.nbytes for tensor in mine.values()) * 8
        assert (rows[key].num_modules, rows[key].num_weights) == (modules, weights)
    assert [rows[key].group_size for key in (("int", 3), ("int", 4), ("float32", 32))] == ["-1", "43", ""]


def test_of_several_adapters_the_active_one_counts(bases: Path, tmp_path: Path) -> None:
    base = save_base("llama", bases)
    model = make_student("llama", bases, bits=2, steps=0)
    model.add_adapter("four", BitDistillerConfig(bits=4, group_size=64))
    for name, bits in (("default", 2), ("four", 4)):
        model.set_adapter(name)
        assert {row.bits for row in quant_summary(model).rows} == {bits, 32}
        assert quant_summary(model).rows[0].num_modules == 14
        summary = quant_summary(model)
        assert sum(row.num_weights for row in summary.rows) == num_weights(base)
    packed = model.pack_and_unload(progressbar=False)
    packed.save_pretrained(tmp_path)
    assert summary.num_bytes == file_bytes(tmp_path)
    check(packed, tmp_path, base)


@pytest.mark.parametrize(
    "settings",
    [{"train_other": "norms"}, {"train_other": "all"}, {"modules_to_save": ["lm_head", "norm"]}],
    ids=str,
)
@pytest.mark.parametrize("num_adapters", [1, 2])
def test_trained_copies_count_once(bases: Path, settings: dict[str, Any], num_adapters: int, tmp_path: Path) -> None:
    base = save_base("llama", bases)
    student = make_student("llama", bases, steps=0, **settings)
    for number in range(1, num_adapters):
        student.add_adapter(f"copy{number}", BitDistillerConfig(group_size=32, **settings))
    before = quant_summary(student)
    packed = student.pack_and_unload(progressbar=False)
    packed.save_pretrained(tmp_path)
    check(packed, tmp_path, base)
    assert before.num_bytes == file_bytes(tmp_path)
    assert before.bits_per_weight == quant_summary(packed).bits_per_weight


def test_copies_of_an_adapter_that_is_not_active_do_not_count(bases: Path, tmp_path: Path) -> None:
    student = make_student("llama", bases, steps=0, train_other="all")
    student.add_adapter("plain", BitDistillerConfig(group_size=32))
    student.set_adapter("plain")
    before = quant_summary(student)
    packed = student.pack_and_unload(progressbar=False)
    packed.save_pretrained(tmp_path)
    check(packed, tmp_path, save_base("llama", bases))
    assert before.num_bytes == file_bytes(tmp_path)


def test_a_disabled_student_and_a_part_of_a_model_are_counted_too(bases: Path, saved: GetSaved) -> None:
    student = make_student("llama", bases, steps=0)
    enabled = quant_summary(student)
    with student.disable_adapter():
        assert quant_summary(student) == enabled
    layer = saved("llama").model.model.layers[0].mlp.down_proj
    (row,) = quant_summary(layer).rows
    assert (row.state, row.num_weights) == ("packed", 64 * 128)
    assert row.stored_bits == sum(parameter.nbytes for parameter in layer.parameters()) * 8
    assert quant_summary(torch.nn.Identity()).bits_per_weight == 0


def test_a_latent_model_says_what_it_will_take_once_packed(bases: Path, saved: GetSaved, tmp_path: Path) -> None:
    config = BitDistillerQuantConfig(group_size=32, state="latent")
    model = load(save_base("llama", bases), quantization_config=config)
    assert quant_summary(model).num_bytes == file_bytes(saved("llama").folder)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"{quant_summary(model).bits_per_weight:.2f} bits per weight once packed" in card
    assert "file headers counted" not in card


def test_the_printed_table_and_the_card_show_these_numbers(saved: GetSaved, capsys: pytest.CaptureFixture[str]) -> None:
    original = saved("mixtral")
    print_quant_summary(original.model)
    by_kind, by_part, (size, kernels) = (block.splitlines() for block in capsys.readouterr().out.strip().split("\n\n"))
    header, ruler, *rows, total = by_kind
    assert header.split() == ["weights", "bits", "group", "state", "tensors", "parameters", "bits/weight"]
    assert set(ruler) == {"-"}
    bits = file_bytes(original.folder) * 8
    weights = sum(row.num_weights for row in quant_summary(original.model).rows)
    assert total.split()[-2:] == [f"{weights:,}", f"{bits / weights:.3f}"]
    assert size == f"packed size: {bits / 8 / 2**20:,.1f} MiB"
    assert kernels == f"kernels on cpu: {backend_info('cpu')}"
    assert [row.split()[0] for row in rows] == ["int", "float32"]
    card = (original.folder / "README.md").read_text(encoding="utf-8")
    assert by_part[0].split()[:3] == ["part", "weights", "bytes"]
    assert f"{bits / 8:,.0f}" in by_part[-1]
    assert f"| total | {weights:,} | {(original.folder / WEIGHTS).stat().st_size:,} |" in card
    on_disk = (original.folder / WEIGHTS).stat().st_size * 8
    assert f"{on_disk / weights:.2f} bits per weight, embeddings, scales and file headers counted." in card
    assert all(cell in card for row in rows for cell in row.split())


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("llama", {"bits": 2}),
        ("llama-tied", {"bits": 3, "group_size": -1}),
        ("llama-172", {"bits": 3, "group_size": -1}),
        ("qwen2", {"grid": "nf", "bits": 3}),
        ("llama", {"grid": "ternary", "packing": "base3"}),
        ("llama", {"grid": "r2q", "subln": "all"}),
        ("mixtral", {"bits": 2}),
        ("gpt2", {"bits": 4}),
        ("llama", {"bits": 3, "target_modules": r".*(_proj|lm_head)"}),
    ],
    ids=str,
)
def test_the_parts_are_the_file_to_the_last_bit(
    arch: str, settings: dict[str, Any], bases: Path, saved: GetSaved, tmp_path: Path
) -> None:
    student = make_student(arch, bases, steps=0, **settings)
    before = quant_summary(student)
    model = student.pack_and_unload(progressbar=False)
    model.save_pretrained(tmp_path)
    summary = quant_summary(model).with_files(tmp_path)
    bits = {part.part: part.stored_bits for part in summary.parts}
    assert sum(bits.values()) == 8 * (tmp_path / WEIGHTS).stat().st_size
    gains = sum(tensor.numel() for name, tensor in load_file(tmp_path / WEIGHTS).items() if "input_norm" in name)
    assert sum(part.num_weights for part in summary.parts) == num_weights(save_base(arch, bases)) + gains
    assert {part: size for part, size in bits.items() if part != "metadata"} == {
        part.part: part.stored_bits for part in before.parts
    }
    # against the file: what its names say, read apart from any model
    tensors = load_file(tmp_path / WEIGHTS)
    packed = {name for name in tensors if f"{name}_scale" in tensors}
    scales = [name for name in tensors if name.endswith(("_scale", "_scale_negative", "_scale_residual"))]
    zeros = [name for name in tensors if name.endswith("_zero_point")]
    assert bits["scales"] == 8 * sum(tensors[name].nbytes for name in scales)
    words = 8 * sum(tensors[name].nbytes for name in (*packed, *zeros))
    assert bits["codes"] + bits.get("zero points", 0) + bits.get("padding", 0) == words
    norms = [name for name in tensors if re.search(r"norm|ln_", name)]
    assert bits["norms"] == 8 * sum(tensors[name].nbytes for name in norms if name not in (*packed, *scales, *zeros))
    heads = [name for name in tensors if "lm_head" in name and name not in (*packed, *scales, *zeros)]
    assert bits.get("head", 0) == 8 * sum(tensors[name].nbytes for name in heads)
    start = 8 + int.from_bytes((tmp_path / WEIGHTS).read_bytes()[:8], "little")
    assert bits["metadata"] == 8 * start


def test_padding_is_counted_apart(bases: Path) -> None:
    summary = quant_summary(make_student("llama-172", bases, steps=0, bits=3, group_size=-1))
    bits = {part.part: part.stored_bits for part in summary.parts}
    # rows of 64 and 172 codes of 3 bits take 6 and 17 words of 32; one zero point of 3 bits takes one
    rows = {64: 2 * (64 + 32 + 32 + 64 + 172 + 172), 172: 2 * 64}
    tails = {width: 32 * -(-3 * width // 32) - 3 * width for width in rows}
    assert bits["padding"] == sum(count * (32 - 3 + tails[width]) for width, count in rows.items())
