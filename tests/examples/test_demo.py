"""The demo goes through every stage on a tiny model and leaves the summary that the next step reads."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.standin import save_standin

ROOT = Path(__file__).parents[2]
FIELDS = {"name", "perplexity", "protocol", "bits_per_weight", "file_bytes", "seconds", "peak_rss_bytes"}


def test_the_demo_runs_to_its_table_and_summary(tmp_path: Path) -> None:
    base = save_standin(tmp_path / "base")
    output = tmp_path / "demo"
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--quick"]
    command += ["--model", str(base), "--output", str(output)]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]

    summary = json.loads((output / "summary.json").read_text())
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == ["full_precision", "rtn", "clip", "distilled"]
    assert all(set(row) == FIELDS for row in rows.values())
    assert all(math.isfinite(row["perplexity"]) and row["perplexity"] > 1 for row in rows.values())
    assert len({row["protocol"] for row in rows.values()}) == 1, "rows that cannot be compared"
    assert rows["rtn"]["file_bytes"] < rows["full_precision"]["file_bytes"]

    packed = AutoModelForCausalLM.from_pretrained(summary["packed_dir"])
    assert packed.config.quantization_config.state == "packed"
    assert torch.isfinite(packed(torch.arange(8).unsqueeze(0)).logits).all()
    assert "distilled" in done.stdout
