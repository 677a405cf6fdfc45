"""The example heals a GPTQ folder: it starts at the published codes, trains, packs, and reports three perplexities."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bitdistiller_peft import BitDistillerConfig, export_model, get_bitdistiller_model
from tests.standin import english, save_standin
from tests.tiny import load

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_example_heals_a_gptq_folder(tmp_path: Path) -> None:
    base = save_standin(tmp_path / "base")
    student = get_bitdistiller_model(load(base), BitDistillerConfig(bits=2, group_size=32))
    export_model(student.pack_and_unload(progressbar=False), "gptq", tmp_path / "gptq")
    (tmp_path / "text.txt").write_text("\n\n".join(text[:400] for text in english()[:40]))
    command = [sys.executable, str(ROOT / "examples" / "heal_ptq.py"), "gptq", "--base", "base", "--steps", "3"]
    run = subprocess.run(
        [*command, "--text", "text.txt", "--output", "out"], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert "as published:   perplexity" in run.stdout
    assert "healed:         perplexity" in run.stdout
    config = json.loads((tmp_path / "out" / "packed" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["provenance"]["imported_format"]) == (2, 32, "gptq")
