"""Work is not lost: a stopped run saves and goes on as if nothing was; a damaged checkpoint is passed over, by name."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.training.checkpoints import MANIFEST_NAME, damage_of, resumable
from tests.training import helpers

SETTINGS: dict[str, Any] = {
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "max_steps": 4,
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
}
SAVED = {**SETTINGS, "save_strategy": "steps", "save_steps": 1}


class Sends(TrainerCallback):
    """Sends this process a signal in the middle of a step, as often as asked."""

    def __init__(self, number: int, step: int, times: int = 1) -> None:
        self.number, self.step, self.times = number, step, times

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C as in a terminal: a job started in the background ignores it, and so would the run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "error", "status"),
    [(signal.SIGTERM, SystemExit, 130), (signal.SIGINT, KeyboardInterrupt, None)],
    ids=["sigterm", "ctrl-c"],
)
def test_a_signal_finishes_the_step_and_saves_and_the_run_goes_on_to_the_last_bit(
    bases: Path, tmp_path: Path, number: int, error: type[BaseException], status: int | None
) -> None:
    whole = helpers.trainer(helpers.student(bases), tmp_path / "a", **SETTINGS)
    whole.train()
    stopped = helpers.trainer(helpers.student(bases), tmp_path / "b", **SETTINGS)  # that saves nothing by itself
    stopped.add_callback(Sends(number, step=2))
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(error) as raised:
        stopped.train()
    assert getattr(raised.value, "code", None) == status
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert stopped.state.global_step == 2
    assert damage_of(tmp_path / "b" / "checkpoint-2") is None
    again = helpers.trainer(helpers.student(bases), tmp_path / "b", **SETTINGS)
    again.train(resume_from_checkpoint=True)
    assert helpers.difference(helpers.weights(whole.model), helpers.weights(again.model)) == 0
    assert helpers.history(again) == helpers.history(whole)


def test_the_second_ctrl_c_does_not_wait(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, **SETTINGS)
    run.add_callback(Sends(signal.SIGINT, step=2, times=2))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.state.global_step == 1
    assert not list(tmp_path.glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.fixture(scope="module")
def saved(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run of three steps, each saved."""
    folder = tmp_path_factory.mktemp("saved")
    helpers.trainer(helpers.student(bases), folder, **SAVED | {"max_steps": 3}).train()
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "weights-cut": lambda folder: cut(folder / "adapter_model.safetensors"),
    "optimizer-cut": lambda folder: cut(folder / "optimizer.pt"),
    "optimizer-missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "weights-missing": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "state-missing": lambda folder: (folder / "trainer_state.json").unlink(),
    "state-cut": lambda folder: cut(folder / "trainer_state.json"),
}


@pytest.mark.parametrize("name", [*DAMAGE, "bit-flip", "manifest-cut"])
def test_a_damaged_checkpoint_is_passed_over_for_the_newest_whole_one(
    folder: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    others = {
        "bit-flip": lambda folder: flip(folder / "adapter_model.safetensors"),
        "manifest-cut": lambda folder: cut(folder / MANIFEST_NAME),
    }
    (DAMAGE | others)[name](folder / "checkpoint-3")
    with caplog.at_level(logging.WARNING):
        assert resumable(True, str(folder)) == str(folder / "checkpoint-2")
    assert "checkpoint-3" in caplog.text
    with pytest.raises(CheckpointError, match=r"checkpoint-3: .*Go on from .*checkpoint-2"):
        resumable(str(folder / "checkpoint-3"), str(folder))


@pytest.mark.parametrize("name", [name for name in DAMAGE if name != "optimizer-missing"])
def test_a_checkpoint_that_was_cut_off_before_its_manifest_is_looked_at_file_by_file(folder: Path, name: str) -> None:
    (folder / "checkpoint-3" / MANIFEST_NAME).unlink()
    assert damage_of(folder / "checkpoint-3") is None
    DAMAGE[name](folder / "checkpoint-3")
    assert resumable(True, str(folder)) == str(folder / "checkpoint-2")


def test_a_run_with_a_damaged_last_checkpoint_goes_on(bases: Path, folder: Path, saved: Path) -> None:
    cut(folder / "checkpoint-3" / "optimizer.pt")
    again = helpers.trainer(helpers.student(bases), folder, **SAVED | {"max_steps": 3})
    again.train(resume_from_checkpoint=True)
    first = json.loads((saved / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
    assert helpers.history(again) == [entry["loss"] for entry in first if "loss" in entry]


def test_without_a_whole_checkpoint_nothing_is_started_anew(folder: Path) -> None:
    for step in (1, 2, 3):
        cut(folder / f"checkpoint-{step}" / "trainer_state.json")
    with pytest.raises(CheckpointError, match=r"must be whole: .*checkpoint-3.*checkpoint-1"):
        resumable(True, str(folder))


def test_auto_needs_nobody(bases: Path, folder: Path, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Killed before the first checkpoint was whole, a run starts anew and says so; else it goes on."""
    assert resumable("auto", str(folder)) == str(folder / "checkpoint-3")
    for step in (1, 2, 3):
        cut(folder / f"checkpoint-{step}" / "trainer_state.json")
    again = helpers.trainer(helpers.student(bases), folder, **SAVED | {"max_steps": 3})
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint="auto")
    assert "No checkpoint in" in caplog.text
    assert "Starting anew" in caplog.text
    assert damage_of(folder / "checkpoint-3") is None
    state = json.loads((saved / "checkpoint-3" / "trainer_state.json").read_text())
    assert helpers.history(again) == [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_auto_starts_a_first_run_too(bases: Path, tmp_path: Path) -> None:
    run = helpers.trainer(helpers.student(bases), tmp_path, **SETTINGS | {"max_steps": 1})
    run.train(resume_from_checkpoint="auto")
    assert run.state.global_step == 1


def test_a_missing_optimizer_is_an_error_and_no_fresh_start(bases: Path, tmp_path: Path) -> None:
    settings = SAVED | {"max_steps": 1, "save_only_model": True}
    helpers.trainer(helpers.student(bases), tmp_path, **settings).train()
    again = helpers.trainer(helpers.student(bases), tmp_path, **SAVED)
    for resume in (True, "auto", str(tmp_path / "checkpoint-1")):
        with pytest.raises(CheckpointError, match=r"has no optimizer\.pt .*save_only_model"):
            again.train(resume_from_checkpoint=resume)


def test_without_any_checkpoint_transformers_says_so(bases: Path, tmp_path: Path) -> None:
    assert resumable(True, str(tmp_path)) is None
    with pytest.raises(ValueError, match="No valid checkpoint"):
        helpers.trainer(helpers.student(bases), tmp_path, **SETTINGS).train(resume_from_checkpoint=True)
