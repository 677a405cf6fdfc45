"""What a model is computed in where the command may choose, and that it is stored as it came."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bitdistiller_peft.cli.precision import asked_dtype
from bitdistiller_peft.hub import precision
from tests.cli.conftest import Command


@pytest.mark.parametrize(
    ("asked", "stored", "device", "is_native", "chosen"),
    [
        ("auto", "bfloat16", "cpu", False, "float32"),
        ("auto", "float16", "cpu", False, "float32"),
        ("auto", "bfloat16", "cpu", True, "bfloat16"),
        ("auto", "bfloat16", "cuda", False, "bfloat16"),
        ("auto", "float32", "cpu", False, "float32"),
        ("bfloat16", "bfloat16", "cpu", False, "bfloat16"),
    ],
)
def test_a_slow_dtype_is_left_only_where_the_command_is_free(
    asked: str, stored: str, device: str, is_native: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: is_native)
    assert asked_dtype(asked, stored, device) == chosen


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_what_is_packed_is_stored_as_the_model_came(
    command: Command,
    base: Path,
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: False)
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (half / name).write_bytes((base / name).read_bytes())
    options = ("--bits", 2, "--group-size", 32, "--texts", files / "text.txt", "--num-samples", 2, "--seq-len", 64)
    where = ("--device", "cpu", "--dtype", dtype, "--output", tmp_path / "out", "--pack")
    done = command("calibrate", "--model", half, *options, *where)
    assert done.code == 0, done.err
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "packed")
    assert packed.dtype == packed.model.embed_tokens.weight.dtype == expected
    original = AutoModelForCausalLM.from_pretrained(half)
    assert torch.equal(packed.model.embed_tokens.weight.float(), original.model.embed_tokens.weight.float())
    assert packed.model.layers[0].self_attn.q_proj.weight_scale.dtype == torch.float16
    assert command("verify", tmp_path / "out" / "packed").code == 0
