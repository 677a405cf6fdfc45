"""The example walks through all three stages on a tiny model and leaves accuracies and a packed model."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from bitdistiller_peft.layers import PackedLinear, SubLN
from tests.standin import english, save_standin

ROOT = Path(__file__).parents[2]
REVIEWS = [("a charming and affecting journey", 1), ("contains no wit", 0), ("a joy to watch", 1), ("dull", 0)]


def test_teacher_baseline_and_student_are_trained_and_measured(tmp_path: Path) -> None:
    base = save_standin(tmp_path / "base")
    lines = "\n".join(json.dumps({"sentence": text, "label": label}) for text, label in REVIEWS)
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "text.txt").write_text(english()[0][:20_000], encoding="utf-8")
    sizes = {"rows": 4, "steps": 2, "batch-size": 2, "eval-rows": 4, "split-heads": 8}
    folders = {"model": base, "data": tmp_path, "text": tmp_path / "text.txt", "output": tmp_path / "out"}
    options = [f"--{name}={value}" for name, value in {**folders, **sizes}.items()]
    subprocess.run(
        [sys.executable, str(ROOT / "examples" / "bitnet_distillation.py"), *options],
        check=True,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result.keys() == {"teacher", "bitnet_sft", "bitdistill"}
    assert all(0 <= value <= 1 and value * 4 == int(value * 4) for value in result.values())
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "packed")
    assert packed.config.quantization_config.packing == "base3"
    assert sum(isinstance(m, SubLN) for m in packed.modules()) == 4
    assert {m.activation_bits for m in packed.modules() if isinstance(m, PackedLinear)} == {8}
