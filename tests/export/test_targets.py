"""A config that an engine cannot run is refused before training, and one that is let through does export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitdistiller_peft import BitDistillerConfig, export_model
from bitdistiller_peft.errors import ConfigError, UnknownNameError
from bitdistiller_peft.export import TARGETS, check_target

FORMATS = {"vllm": "compressed-tensors", "llama.cpp": "gguf", "mlx": "mlx", "transformers": "compressed-tensors"}


@pytest.mark.parametrize(
    ("target", "settings", "reason"),
    [
        ("vllm", {"grid": "nf", "bits": 3}, r"grid='nf' \(use one of"),
        ("vllm", {"group_size": 48}, r"group_size=48 \(use one of \[-1, 32, 64, 128\]\)"),
        ("vllm", {"scale_dtype": "float32"}, "scale_dtype='float32'"),
        ("vllm", {"overrides": {"q_proj": {"bits": 4}}}, r"different settings for \['self_attn.q_proj'"),
        ("vllm", {"overrides": {r"layers\.3\.mlp\.up_proj": {"bits": 4}}}, "'mlp.up_proj'"),
        ("vllm", {"activation_bits": 8}, r"activation_bits=8 \(use None\)"),
        ("vllm", {"subln": "output"}, "subln='output'"),
        ("llama.cpp", {"bits": 2, "group_size": 64}, r"zero_point_range=None \(use \(1, 2\) at 2 bits\)"),
        ("llama.cpp", {"bits": 2, "group_size": 32, "zero_point_range": [1, 2]}, "use a multiple of 64"),
        ("llama.cpp", {"bits": 4}, "bits=4 with grid='int'"),
        ("llama.cpp", {"bits": 3, "scale_dtype": "bfloat16"}, r"use one of \['float16'\]"),
        ("llama.cpp", {"bits": 3, "group_size": 48}, "use a multiple of 32"),
        (
            "mlx",
            {"bits": 3, "overrides": {"down_proj": {"group_size": 16}}},
            r"overrides\['down_proj'\]: group_size=16",
        ),
        ("onnx", {"bits": 3}, r"use one of \[2, 4, 8\]"),
        ("transformers", {"overrides": {"down_proj": {"bits": 4}}}, "all layers must be quantized alike"),
    ],
    ids=str,
)
def test_what_an_engine_cannot_run_is_named_with_what_it_can(
    target: str, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_target(BitDistillerConfig(**settings), target)


def test_all_faults_are_said_at_once() -> None:
    config = BitDistillerConfig(bits=3, group_size=48, scale_dtype="float32")
    with pytest.raises(ConfigError) as caught:
        check_target(config, "onnx")
    assert "bits=3" in str(caught.value)
    assert "group_size=48" in str(caught.value)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'vllm'"):
        check_target(BitDistillerConfig(), "vlm")


@pytest.mark.parametrize("target", sorted(TARGETS))
@pytest.mark.parametrize("grid", ["int", "int_sym", "ternary"])
def test_what_passes_does_export(target: str, grid: str, packed: Callable[..., Path], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"bits": 2, "group_size": 64, "grid": grid}
    if target == "llama.cpp" and grid == "int":
        settings["zero_point_range"] = (1, 2)
    check_target(BitDistillerConfig(**settings), target)
    if target == "mlx":
        pytest.importorskip("mlx", reason="mlx has no wheels for some machines")
    if target in FORMATS:  # there is no ONNX writer yet
        export_model(packed("llama", **settings), FORMATS[target], tmp_path / "out")
