"""GPTQ and AWQ files against straight unpackers written from the published layouts, one number at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bitdistiller_peft import export_model
from bitdistiller_peft.export import PackedSource

LAYER = "model.layers.1.mlp.down_proj"


def unsigned(word: int) -> int:
    return word & 0xFFFFFFFF


def gptq_column(words: list[int], bits: int) -> list[int]:
    """Codes of one column of qweight. 3-bit words come in threes: 10 codes, a split one, 10, a split one, 10."""
    words = [unsigned(word) for word in words]
    if bits != 3:
        return [(word >> shift) & ((1 << bits) - 1) for word in words for shift in range(0, 32, bits)]
    codes = []
    for first, second, third in zip(words[::3], words[1::3], words[2::3], strict=True):
        codes += [(first >> (3 * i)) & 7 for i in range(10)]
        codes.append((first >> 30) | ((second & 1) << 2))
        codes += [(second >> (3 * i + 1)) & 7 for i in range(10)]
        codes.append((second >> 31) | ((third & 3) << 1))
        codes += [(third >> (3 * i + 2)) & 7 for i in range(10)]
    return codes


@pytest.mark.parametrize(("bits", "version"), [(2, 2), (3, 2), (4, 2), (8, 2), (4, 1), (3, 1)], ids=str)
def test_gptq_stores_what_its_layout_says(bits: int, version: int, packed: Callable[..., Path], tmp_path: Path) -> None:
    settings = {"bits": bits} if version == 2 else {"bits": bits, "grid": "int_sym"}
    folder = packed("llama", **settings)
    export_model(folder, "gptq", tmp_path / "out", version=version)
    found, weight = load_file(tmp_path / "out" / "model.safetensors"), PackedSource(folder).weight(f"{LAYER}.weight")
    qweight, qzeros = found[f"{LAYER}.qweight"], found[f"{LAYER}.qzeros"]
    for column in (0, 1, 63):
        assert gptq_column(qweight[:, column].tolist(), bits) == weight.codes[column].tolist()
    for group in range(len(qzeros)):
        stored = gptq_column(qzeros[group].tolist(), bits)
        zeros = [2 ** (bits - 1)] * 64 if version == 1 else weight.params.zero_point[:, group].tolist()  # type: ignore[index]
        assert [zero + (version == 1) for zero in stored] == zeros
    assert torch.equal(found[f"{LAYER}.scales"], weight.params.scale.T)
    assert found[f"{LAYER}.g_idx"].tolist() == [i // 32 for i in range(128)]


def test_gptq_version_1_refuses_a_zero_point_of_zero(packed: Callable[..., Path], tmp_path: Path) -> None:
    from bitdistiller_peft.errors import ExportError

    with pytest.raises(ExportError, match=r"version 1 cannot store.*'gptq', output_dir\)"):
        export_model(packed("llama", bits=2, zero_point_range=(0, 0)), "gptq", tmp_path / "out", version=1)


@pytest.mark.parametrize("bits", [2, 4])
def test_awq_stores_what_its_layout_says(bits: int, packed: Callable[..., Path], tmp_path: Path) -> None:
    """Output channel c of eight lies in nibble 0, 4, 1, 5, 2, 6, 3, 7 of its word (AutoAWQ's reverse order)."""
    folder = packed("llama", bits=bits)
    export_model(folder, "awq", tmp_path / "out")
    found, weight = load_file(tmp_path / "out" / "model.safetensors"), PackedSource(folder).weight(f"{LAYER}.weight")
    assert weight.params.zero_point is not None
    for name, expected in (("qweight", weight.codes.T), ("qzeros", weight.params.zero_point.T)):
        words = found[f"{LAYER}.{name}"].tolist()
        for row in (0, len(words) - 1):
            values = [
                (unsigned(word) >> (4 * nibble)) & 15 for word in words[row] for nibble in (0, 4, 1, 5, 2, 6, 3, 7)
            ]
            assert values == expected[row].tolist()
    assert torch.equal(found[f"{LAYER}.scales"], weight.params.scale.T)
