"""The quickstart runs as a user runs it, and its reloaded model equals the trained one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.standin import save_standin

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


def test_the_quickstart_packs_and_reloads_what_it_trained(tmp_path: Path) -> None:
    base = save_standin(tmp_path / "base")
    output = run(str(base), str(tmp_path / "packed"))
    assert output.strip().endswith("reloaded logits equal the trained ones: True")
    losses = [float(line.split()[-1]) for line in output.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0]
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["state"]) == (2, 64, "packed")
    assert {"bitdistiller.json", "README.md"} <= {path.name for path in (tmp_path / "packed").iterdir()}
