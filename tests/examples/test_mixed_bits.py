"""The example keeps its budget: what is written has exactly the size that was predicted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.standin import english, save_standin

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_example_keeps_its_budget(tmp_path: Path) -> None:
    base = save_standin(tmp_path / "base")
    (tmp_path / "text.txt").write_text("\n\n".join(text[:400] for text in english()[:60]))
    command = [sys.executable, str(ROOT / "examples" / "mixed_bits.py"), str(base), "--bits-per-weight", "6.2"]
    small = ["--group-size", "32", "--samples", "4", "--steps", "2", "--text", "text.txt", "--output", "out"]
    run = subprocess.run([*command, *small], cwd=tmp_path, check=True, capture_output=True, text=True)
    predicted, written = re.search(r"predicted ([\d,]+) bytes, written ([\d,]+)", run.stdout).groups()
    assert predicted == written
    weights = 512 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
    assert int(written.replace(",", "")) <= 6.2 * weights / 8
    section = json.loads((tmp_path / "out/packed/config.json").read_text())["quantization_config"]
    assert section["embeddings"] == ["model.embed_tokens"]
