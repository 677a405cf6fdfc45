"""The example goes through the whole recipe on a tiny model and leaves scores and a packed model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.standin import save_standin

ROOT = Path(__file__).parents[2]
SMALL = ("--clip-samples=2", "--prompts=4", "--new-tokens=8", "--steps=2", "--chunks=2", "--group-size=32")


@pytest.mark.parametrize(
    ("options", "grid"),
    [
        ((), "int"),
        pytest.param(("--bits=3", "--arithmetic=released"), "nf", marks=pytest.mark.slow),
        pytest.param(("--arithmetic=released",), "int", marks=pytest.mark.slow),
    ],
    ids=["2-bit", "3-bit-released", "2-bit-released"],
)
def test_the_recipe_runs_from_end_to_end(options: tuple[str, ...], grid: str, tmp_path: Path) -> None:
    base, output = save_standin(tmp_path / "base"), tmp_path / "out"
    command = [sys.executable, str(ROOT / "examples" / "bitdistiller.py"), f"--model={base}", f"--output={output}"]
    done = subprocess.run(
        [*command, *SMALL, *options],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["grid"] == grid
    assert 0 < summary["gamma"] <= 1.1
    assert list(summary["perplexity"]) == ["full_precision", "clip", "bitdistiller"]
    assert all(math.isfinite(value) and value > 1 for value in summary["perplexity"].values())
    packed = AutoModelForCausalLM.from_pretrained(output / "packed")
    assert (packed.config.quantization_config.grid, packed.config.quantization_config.state) == (grid, "packed")
    assert (output / "teacher" / "teacher_data.jsonl").exists()
