"""What exports share: config.json, with the rotation as both old and new engines read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from bitdistiller_peft import export_model

LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_3 |= {"original_max_position_embeddings": 8192}
GEMMA_3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}


@pytest.mark.parametrize(
    ("architecture", "rope", "older"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 1e5}, {"rope_theta": 1e5}),
        ("llama", {**LLAMA_3, "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": LLAMA_3}),
        (
            "gemma3",
            GEMMA_3,
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
    ],
    ids=["plain", "llama3", "two-kinds"],
)
def test_the_rotation_is_written_under_both_names(
    architecture: str, rope: dict[str, Any], older: dict[str, Any], packed: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(packed(architecture), model)
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_parameters": rope}))
    (model / "bitdistiller.json").unlink()
    before = AutoConfig.from_pretrained(model).rope_parameters
    export_model(model, "dequantized", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: written.get(key) for key in older} == older
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == before
