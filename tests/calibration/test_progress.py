"""A block-wise reconstruction that is stopped goes on with the first block that is missing, to the same last bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitdistiller_peft.calibration import CalibrationResult, blockwise, calibrate
from bitdistiller_peft.calibration.progress import FORMAT, Progress
from bitdistiller_peft.calibration.slots import find_student
from bitdistiller_peft.errors import CheckpointError, ConfigError
from tests.calibration.models import IDS, student

QUICK = {"method": "blockwise", "epochs": 1, "learning_rate": 0.02, "show_progress": False}
FILES = ["calibration.json", "model.layers.0.safetensors", "model.layers.1.safetensors"]


class Stopped(BaseException):
    """Stands for the process's end."""


def run(model: nn.Module, folder: Path | None, ids: Tensor = IDS, **options: Any) -> CalibrationResult:
    return calibrate(model, None, ids, resume_dir=folder, **{**QUICK, **options})


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def stop_in(monkeypatch: pytest.MonkeyPatch, block: str, error: type[BaseException] = Stopped) -> list[str]:
    """Stop when a block begins to be trained; the list collects which ones were."""
    trained: list[str] = []
    train = blockwise._Block._train

    def stopping(self: Any, options: Any) -> None:
        trained.append(self.name)
        if self.name == block:
            raise error
        train(self, options)

    monkeypatch.setattr(blockwise._Block, "_train", stopping)
    return trained


@pytest.fixture
def stopped(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was stopped in the second block."""
    with monkeypatch.context() as patch:
        stop_in(patch, "model.layers.1")
        with pytest.raises(Stopped):
            run(student(models), tmp_path / "blocks")
    return tmp_path / "blocks"


@pytest.mark.parametrize(
    ("config", "options"),
    [({}, {}), ({"learn_zero_point": True}, {"seed": 3}), ({"learn_scale": False}, {"targets": "quantized"})],
    ids=["learned", "zero-points", "weights-only"],
)
def test_a_stopped_run_ends_with_the_bytes_and_the_report_of_an_uninterrupted_one(
    config: dict[str, Any], options: dict[str, Any], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again = student(models, **config), student(models, **config)
    expected = run(whole, None, **options)
    with monkeypatch.context() as patch:
        stop_in(patch, "model.layers.1")
        with pytest.raises(Stopped):
            run(student(models, **config), tmp_path / "blocks", **options)
    assert sorted(path.name for path in (tmp_path / "blocks").iterdir()) == FILES[:2]
    trained = stop_in(monkeypatch, "none")
    found = run(again, tmp_path / "blocks", **options)
    assert trained == ["model.layers.1"]
    assert_equal(state(again), state(whole))
    assert [report.name for report in found.blocks] == ["model.layers.0", "model.layers.1"]
    assert [(r.error_before, r.error_after) for r in found.blocks] == [
        (r.error_before, r.error_after) for r in expected.blocks
    ]
    assert [r.name for r in found.layers] == [r.name for r in expected.layers]
    assert found.ranges.keys() == expected.ranges.keys()
    assert all(torch.equal(a, b) for n in found.ranges for a, b in zip(found.ranges[n], expected.ranges[n]))  # noqa: B905


def test_a_finished_run_is_taken_over_whole(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = student(models), student(models)
    run(first, tmp_path / "blocks")
    trained = stop_in(monkeypatch, "none")
    run(again, tmp_path / "blocks")
    assert trained == []
    assert_equal(state(again), state(first))


def test_after_ctrl_c_the_very_same_model_goes_on(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = student(models), student(models)
    with monkeypatch.context() as patch:
        stop_in(patch, "model.layers.1", KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "blocks")
    run(model, tmp_path / "blocks")
    run(whole, None)
    assert_equal(state(model), state(whole))


def other_model(folder: Path, models: Path) -> dict[str, Any]:
    model = student(models)
    base, _ = find_student(model)
    base.model.norm.weight.data[0] += 1
    return {"model": model}


DIFFERENT: dict[str, tuple[Callable[[Path, Path], dict[str, Any]], str]] = {
    "options": (lambda folder, models: {"learning_rate": 0.01}, r"learning_rate was 0\.02, is 0\.01"),
    "data": (lambda folder, models: {"ids": IDS + 1}, "tokens_sha256 was"),
    "batch": (lambda folder, models: {"batch_size": 2}, "batch_size was 1, is 2"),
    "teacher": (other_model, "full-precision weights differ"),
    "grid": (lambda folder, models: {"model": student(models, bits=3)}, "quantized otherwise"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_another_run_is_refused_by_what_differs(name: str, stopped: Path, models: Path) -> None:
    make, message = DIFFERENT[name]
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    changes = make(stopped, models)
    model = changes.pop("model", None) or student(models)
    with pytest.raises(ConfigError, match=rf"`resume_dir` must hold the same run.*{message}"):
        run(model, stopped, **changes)
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before


def test_a_student_that_was_changed_since_is_refused(stopped: Path, models: Path) -> None:
    model = student(models)
    find_student(model)[1][0].student.weight.data[0, 0] += 1
    with pytest.raises(ConfigError, match=r"must be as it was .*model\.layers\.0\.self_attn\.q_proj\.weight.*anew"):
        run(model, stopped)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def drop_one(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:500]),
    "empty": lambda path: path.write_bytes(b""),
    "bit": flip,
    "dropped": drop_one,
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_block_is_done_again_and_so_are_those_built_on_it(
    name: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole, again = student(models), student(models)
    run(whole, tmp_path / "blocks")
    DAMAGE[name](tmp_path / "blocks" / FILES[1])
    trained = stop_in(monkeypatch, "none")
    with caplog.at_level(logging.WARNING):
        run(again, tmp_path / "blocks")
    assert trained == ["model.layers.0", "model.layers.1"]
    assert ("Damaged block passed over" in caplog.text) == (name != "missing")
    assert_equal(state(again), state(whole))


def test_other_folders_and_other_methods_are_refused(models: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="`resume_dir` must be a folder of its own"):
        run(student(models), tmp_path)
    with pytest.raises(ConfigError, match="`resume_dir` must be None but for method='blockwise'"):
        calibrate(student(models), None, IDS, method="clip", resume_dir=tmp_path / "x", show_progress=False)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"format_version": 2, "began": {}})])
def test_a_manifest_that_cannot_be_read_is_refused(content: str, stopped: Path, models: Path) -> None:
    (stopped / FILES[0]).write_text(content)
    with pytest.raises(CheckpointError, match=r"calibration\.json must (be|hold) .*Delete its folder"):
        run(student(models), stopped)


def test_whatever_is_wrong_with_a_manifest_is_said_with_file_and_remedy(stopped: Path, models: Path) -> None:
    path = stopped / FILES[0]
    model = student(models)
    _, slots = find_student(model)
    for content in (
        "[" * 100_000,
        '{"began": []}',
        '{"format_version": true, "began": {}}',
        '{"a": 1, "a": 2}',
        "\udcff",
    ):
        path.write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(CheckpointError, match=r"calibration\.json must .*Delete its folder"):
            Progress(stopped, model, slots, {})


@pytest.mark.parametrize("damage", ["deep", "report", "findings", "text", "folder"])
def test_a_block_whose_report_is_none_is_named_and_done_again(
    damage: str, stopped: Path, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = stopped / FILES[1]
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()[FORMAT])
    changed = {
        "deep": "[" * 100_000,
        "report": json.dumps(about | {"report": {"name": "model.layers.0", "error_before": "1"}}),
        "findings": json.dumps(about | {"findings": {name: [1] for name in about["findings"]}}),
        "text": json.dumps("text"),
    }
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        save_file(load_file(path), path, metadata={FORMAT: changed[damage]})
    with caplog.at_level(logging.WARNING):
        assert _read_or_none(stopped, student(models)) is None
    assert "Damaged block passed over" in caplog.text
    assert FILES[1] in caplog.text


def _read_or_none(folder: Path, model: nn.Module) -> object:
    _, slots = find_student(model)
    was = json.loads((folder / FILES[0]).read_text())
    progress = Progress.__new__(Progress)
    progress.folder, progress._began, progress._taken_over = folder, was["began"], set()
    return progress._read("model.layers.0", [slot for slot in slots if ".layers.0." in slot.name], None)  # type: ignore[arg-type]
