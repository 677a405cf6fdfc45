"""The export example writes what can be held and says why the rest cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.hub.models import make_packed

ROOT = Path(__file__).parents[2]


def test_the_example_exports_and_refuses(tmp_path: Path) -> None:
    make_packed("llama", tmp_path, steps=0, bits=2).save_pretrained(tmp_path / "packed")
    command = [sys.executable, str(ROOT / "examples" / "export.py"), "packed", "out"]
    formats = ["--formats", "bitnet", "dequantized"]
    output = subprocess.run([*command, *formats], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "bitnet: not exported. format 'bitnet' must hold the model exactly" in output
    assert "dequantized, read by safetensors" in output
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dequantized"]
