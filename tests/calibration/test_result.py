"""A calibration can be read, kept, and applied to another copy of the model, and to nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bitdistiller_peft.calibration import CalibrationResult, calibrate
from bitdistiller_peft.calibration.result import FORMAT
from bitdistiller_peft.calibration.slots import find_student
from bitdistiller_peft.errors import CheckpointError, StateError
from tests.calibration.models import IDS, student


@pytest.fixture(scope="module")
def result(models: Path) -> CalibrationResult:
    return calibrate(student(models), None, IDS, show_progress=False, skip=("k_proj",))


def test_the_table_has_a_line_for_every_parameter(result: CalibrationResult) -> None:
    lines = str(result).splitlines()
    assert lines[0] == "method=clip, 12 of 14 parameters, 6 samples of 24 tokens"
    assert lines[1].split()[:3] == ["parameter", "error", "before"]
    assert len(lines) == 3 + 14
    skipped = next(line for line in lines if "layers.1.self_attn.k_proj" in line)
    assert skipped.split()[1:3] == ["-", "-"]
    assert skipped.endswith("skipped")
    assert repr(result) == f"<CalibrationResult: {lines[0]}>"


def test_a_saved_result_comes_back_equal(result: CalibrationResult, tmp_path: Path) -> None:
    again = CalibrationResult.load(result.save(tmp_path / "clip.safetensors"))
    assert str(again) == str(result)
    assert again.data == result.data
    assert again.specs == result.specs
    assert again.clip_weights == result.clip_weights
    assert list(again.ranges) == sorted(result.ranges)
    for name, (low, high) in result.ranges.items():
        assert torch.equal(again.ranges[name][0], low)
        assert torch.equal(again.ranges[name][1], high)
    assert len(again.data["tokens_sha256"]) == 64


@pytest.mark.parametrize(
    "config", [{}, {"grid": "nf"}, {"learn_scale": False}, {"group_size": "tensor"}, {"learn_zero_point": True}]
)
def test_applied_to_a_fresh_model_it_makes_the_same_student(
    config: dict[str, Any], models: Path, tmp_path: Path
) -> None:
    calibrated, fresh = student(models, **config), student(models, **config)
    path = tmp_path / "clip.safetensors"
    calibrate(calibrated, None, IDS, show_progress=False, output_path=path)
    CalibrationResult.load(path).apply(fresh)
    states = calibrated.state_dict(), fresh.state_dict()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_experts_are_kept_too(models: Path, tmp_path: Path) -> None:
    calibrated, fresh = student(models, "mixtral"), student(models, "mixtral")
    result = calibrate(calibrated, None, IDS, show_progress=False)
    CalibrationResult.load(result.save(tmp_path / "clip")).apply(fresh)
    slots = find_student(calibrated)[1], find_student(fresh)[1]
    assert all(torch.equal(a.student(), b.student()) for a, b in zip(*slots, strict=True))


def test_a_model_quantized_otherwise_is_refused_and_left_alone(result: CalibrationResult, models: Path) -> None:
    for config, message in (
        ({"bits": 3}, r"'model\.layers\.0\.self_attn\.q_proj\.weight' must be quantized as it was calibrated"),
        ({"group_size": 16}, "must be quantized as it was calibrated"),
        ({"target_modules": ["q_proj"]}, r"must have the calibrated parameter 'model\.layers\.0\.self_attn\.v_proj"),
    ):
        model = student(models, **config)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            result.apply(model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda low: low[:-1], r"of shape \(64, 2\): got torch.float32, \(63, 2\)"),
        (lambda low: low.double(), "float32 of shape"),
        (lambda low: low * torch.nan, "finite and contain zero"),
        (lambda low: -low, "finite and contain zero"),
    ],
    ids=["shape", "dtype", "nan", "sign"],
)
def test_ranges_that_cannot_be_are_refused_with_the_parameter_named(
    damage: Any, message: str, result: CalibrationResult, models: Path
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    low, high = result.ranges[name]
    broken = replace(result, ranges={**result.ranges, name: (damage(low), high)})
    with pytest.raises(CheckpointError, match=message) as caught:
        broken.apply(student(models))
    assert name in str(caught.value)


def test_a_result_of_trained_weights_is_not_applied(result: CalibrationResult, models: Path) -> None:
    with pytest.raises(StateError, match="save_pretrained"):
        replace(result, method="blockwise").apply(student(models))


def test_files_that_are_none_of_ours_are_refused(result: CalibrationResult, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CalibrationResult.load(tmp_path / "nothing")
    path = tmp_path / "file"
    path.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        CalibrationResult.load(path)
    for metadata in ({}, {FORMAT: "[]"}, {FORMAT: json.dumps({"format_version": 99})}):
        save_file({"a": torch.zeros(1)}, path, metadata=metadata)
        with pytest.raises(CheckpointError, match="format version 1"):
            CalibrationResult.load(path)
    save_file({"a": torch.zeros(1)}, path, metadata={FORMAT: "{"})
    with pytest.raises(CheckpointError, match="cannot be read"):
        CalibrationResult.load(path)


@pytest.mark.parametrize("missing", ["method", "layers", "specs", "data", "blocks", "clip_weights"])
def test_incomplete_files_are_refused(missing: str, result: CalibrationResult, tmp_path: Path) -> None:
    path = result.save(tmp_path / "clip")
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[FORMAT])
    del about[missing]
    save_file({"a.clip_min": torch.zeros(1), "a.clip_max": torch.zeros(1)}, path, metadata={FORMAT: json.dumps(about)})
    with pytest.raises(CheckpointError, match="incomplete"):
        CalibrationResult.load(path)
