"""The examples of AFPQ and R2Q go from a model to a packed one and the summary that the next step reads."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from bitdistiller_peft.layers import PackedLinear
from tests.standin import save_standin

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_standin(tmp_path_factory.mktemp("base"))


def run(name: str, base: Path, output: Path, *options: str) -> tuple[str, dict[str, Any], set[Any]]:
    """What it printed, its summary, and the specs of the packed layers."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--model", str(base), "--output", str(output)]
    done = subprocess.run(
        [*command, "--chunks", "2", *options],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((output / "summary.json").read_text())
    rows = summary["rows"]
    assert all(math.isfinite(row["perplexity"]) and row["perplexity"] > 1 for row in rows)
    assert len({row["protocol"] for row in rows}) == 1, "rows that cannot be compared"
    assert all(row["file_bytes"] < rows[0]["file_bytes"] for row in rows[1:])
    packed = AutoModelForCausalLM.from_pretrained(summary["packed_dir"])
    return done.stdout, summary, {layer.spec for layer in packed.modules() if isinstance(layer, PackedLinear)}


def names(summary: dict[str, Any]) -> list[str]:
    return [row["name"] for row in summary["rows"]]


@pytest.mark.parametrize("method", ["clip", pytest.param("awq", marks=pytest.mark.slow)])
def test_afpq_ends_with_a_packed_model(method: str, base: Path, tmp_path: Path) -> None:
    options = ("--recipe", "afpq-nf3", "--method", method, "--samples", "2", "--group-size", "32")
    printed, summary, specs = run("afpq", base, tmp_path, *options)
    assert names(summary) == ["full_precision", "int3", "nf_sym3", "nf3", f"nf3_{method}"]
    assert [(spec.grid.name, spec.grid.bits, spec.group_size) for spec in specs] == [("nf", 3, 32)]
    assert "one scale: " in printed
    assert "integers: " in printed


def test_r2q_ends_with_a_packed_model(base: Path, tmp_path: Path) -> None:
    options = ("--prompts", "4", "--new-tokens", "16", "--steps", "2", "--refine", "alternating")
    printed, summary, specs = run("r2q", base, tmp_path, *options)
    assert names(summary) == ["full_precision", "int2", "r2q", "r2q_trained"]
    assert [(spec.grid.name, spec.group_size, spec.refine) for spec in specs] == [("r2q", 64, "alternating")]
    assert "2 steps took R2Q from" in printed
    assert (tmp_path / "teacher_data_4x16").is_dir()
