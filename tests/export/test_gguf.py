"""GGUF blocks are what the `gguf` package and llama.cpp read, rows lie as llama.cpp rotates them, and it generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from bitdistiller_peft import export_model
from bitdistiller_peft.export.gguf_blocks import CARRIERS, to_blocks
from bitdistiller_peft.export.llama_cpp import dequantizer
from bitdistiller_peft.export.source import PackedWeight
from bitdistiller_peft.packing import pack_codes
from bitdistiller_peft.quantizers import QuantParams, QuantSpec

# carrier, grid, bits, zero points that it can express
KINDS = [
    ("TQ1_0", "ternary", 2, ()),
    ("TQ2_0", "int", 2, (1, 2)),
    ("Q2_0", "int", 2, (1, 2)),
    ("Q4_0", "int", 3, tuple(range(8))),
    ("Q4_1", "int", 2, (0, 1, 2)),
    ("Q8_0", "int_sym", 8, ()),
]
each_kind = pytest.mark.parametrize(("carrier", "grid", "bits", "zeros"), KINDS, ids=[kind[0] for kind in KINDS])


def random_weight(grid: str, bits: int, zeros: tuple[int, ...], generator: torch.Generator) -> PackedWeight:
    """6 x 512 codes in groups of 256, every code in use."""
    spec = QuantSpec.create(grid, bits, group_size=256)
    codes = torch.randint(0, spec.grid.num_levels, (6, 512), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(6, 2, generator=generator) + 0.01).half()
    chosen = torch.randint(0, max(1, len(zeros)), (6, 2), generator=generator)
    zero_point = torch.tensor(zeros, dtype=torch.uint8)[chosen] if zeros else None
    return PackedWeight("a.weight", spec, 512, pack_codes(codes, bits), QuantParams(scale, zero_point))


@each_kind
def test_the_gguf_package_reads_the_very_values(
    carrier: str, grid: str, bits: int, zeros: tuple[int, ...], generator: torch.Generator
) -> None:
    if carrier not in gguf.GGMLQuantizationType.__members__:
        assert carrier == "Q2_0"  # newer than the package; llama.cpp itself reads it below
        return
    weight = random_weight(grid, bits, zeros, generator)
    blocks = to_blocks(weight, CARRIERS[carrier])
    assert blocks is not None
    data = CARRIERS[carrier].encode(blocks).numpy()
    values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[carrier])
    assert torch.equal(torch.from_numpy(values), weight.dense())
    block, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[carrier]]
    assert (block, num_bytes) == (CARRIERS[carrier].block, CARRIERS[carrier].num_bytes)


@each_kind
def test_llama_cpp_reads_the_very_values(
    carrier: str, grid: str, bits: int, zeros: tuple[int, ...], generator: torch.Generator
) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp's Python wheel is not installed")
    weight = random_weight(grid, bits, zeros, generator)
    blocks = to_blocks(weight, CARRIERS[carrier])
    read = dequantizer(carrier)
    assert blocks is not None
    assert read is not None
    values = read(CARRIERS[carrier].encode(blocks).numpy(), CARRIERS[carrier].block, CARRIERS[carrier].num_bytes)
    assert torch.equal(torch.from_numpy(values), weight.dense())


@each_kind
def test_blocks_come_back_from_bytes(
    carrier: str, grid: str, bits: int, zeros: tuple[int, ...], generator: torch.Generator
) -> None:
    blocks = to_blocks(random_weight(grid, bits, zeros, generator), CARRIERS[carrier])
    assert blocks is not None
    found = CARRIERS[carrier].decode(CARRIERS[carrier].encode(blocks))
    assert torch.equal(found.steps, blocks.steps)
    assert torch.equal(found.d, blocks.d)
    assert (found.m is None) == (blocks.m is None)


@pytest.mark.parametrize("zero_point", [0, 3])
def test_a_zero_point_at_the_end_does_not_fit_two_bits(zero_point: int, generator: torch.Generator) -> None:
    weight = random_weight("int", 2, (zero_point,), generator)
    assert to_blocks(weight, CARRIERS["Q2_0"]) is None
    assert to_blocks(weight, CARRIERS["Q4_0"]) is not None


def test_a_minimum_that_is_no_float16_number_does_not_fit() -> None:
    spec = QuantSpec.create("int", 2, group_size=32)
    scale = torch.tensor([[1.0009765625]], dtype=torch.float16)  # 1 + 2**-10: three times it needs one more bit
    codes = pack_codes(torch.arange(32).reshape(1, 32) % 4, 2)
    weights = [
        PackedWeight("a.weight", spec, 32, codes, QuantParams(scale, torch.tensor([[zero]], dtype=torch.uint8)))
        for zero in (2, 3)
    ]
    assert [to_blocks(weight, CARRIERS["Q4_1"]) is None for weight in weights] == [False, True]


def test_rows_of_q_and_k_alternate_between_the_halves_of_a_head(with_tokenizer: Path, tmp_path: Path) -> None:
    """transformers rotates row i with row i + 8 of a head of 16, llama.cpp row 2 i with row 2 i + 1."""
    from bitdistiller_peft.export import PackedSource

    export_model(with_tokenizer, "gguf", tmp_path / "out", carrier="F32")
    found = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    source = PackedSource(with_tokenizer)
    for theirs, ours, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        dense = source.weight(f"model.layers.0.self_attn.{ours}.weight").dense().numpy()
        for head in range(heads):
            for i in range(8):
                for half in range(2):
                    there = found[f"blk.0.{theirs}.weight"][16 * head + 2 * i + half]
                    assert np.array_equal(there, dense[16 * head + 8 * half + i])
    value = source.weight("model.layers.0.self_attn.v_proj.weight").dense().numpy()
    assert np.array_equal(found["blk.0.attn_v.weight"], value)


def test_the_tokenizer_and_the_shape_of_the_model_are_written(with_tokenizer: Path, tmp_path: Path) -> None:
    export_model(with_tokenizer, "gguf", tmp_path / "out")
    fields: dict[str, Any] = {}
    try:
        fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    except ValueError:  # the released package stops at Q2_0, after the fields
        export_model(with_tokenizer, "gguf", tmp_path / "other", carrier="F16")
        fields = gguf.GGUFReader(tmp_path / "other" / "model.gguf").fields
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.embedding_length": 64,
        "llama.rope.dimension_count": 16,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert {key: fields[key].contents() for key in expected} == expected
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 512
    assert "im_start" in fields["tokenizer.chat_template"].contents()


@pytest.mark.slow
def test_llama_cpp_generates_what_we_generate(with_tokenizer: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp's Python wheel is not installed")
    from benchmarks._engines import LlamaCpp, Transformers
    from tests.tiny import load

    export_model(with_tokenizer, "gguf", tmp_path / "out", carrier="F32")
    prompt = [5, 80, 200, 31]
    model = load(with_tokenizer, dtype=torch.float32)
    ours, theirs = Transformers(model).generate(prompt), LlamaCpp(tmp_path / "out").generate(prompt)
    equal = next((i for i, (a, b) in enumerate(zip(ours.ids, theirs.ids, strict=False)) if a != b), len(theirs.ids))
    assert equal > 0
    # where tokens differ, the two best are as good as equal
    assert equal == len(theirs.ids) or ours.best[equal] - ours.second[equal] < 1e-3
    ids = torch.arange(100).tolist()
    theirs_scores, ours_scores = (
        torch.tensor(it.score(ids)) for it in (LlamaCpp(tmp_path / "out"), Transformers(model))
    )
    torch.testing.assert_close(theirs_scores, ours_scores, rtol=0, atol=5e-3)
