"""Killed at a random moment and called again, every stage ends with the bytes of a run that nothing interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.hub import save as save_module
from bitdistiller_peft.hub import verify_checkpoint
from tests.hub.models import ROOT, WEIGHTS, copy_of, make_packed
from tests.tiny import load
from tests.trust.stages import STAGES


def kill(seed: int, count: int, folder: Path, *stages: str) -> list[dict[str, object]]:
    """One line for each stage, from a process of its own that forks for every kill."""
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.trust.stages", str(seed), str(count), str(folder), *stages],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
        timeout=3600,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return [json.loads(line) for line in child.stdout.splitlines() if line.startswith('{"stage"')]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_survives_three_kills_and_repeats_itself(stage: str, tmp_path: Path) -> None:
    (result,) = kill(1, 3, tmp_path, stage)
    assert result["repeated"] == result["expected"]
    assert len(str(result["expected"])) == 64, result
    assert result["killed"] == 3
    assert result["wrong"] == []


@pytest.mark.nightly
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_survives_twenty_kills(stage: str, tmp_path: Path) -> None:
    (result,) = kill(2, 20, tmp_path, stage)
    print(f"{stage}: {result['killed']} kills, {len(result['wrong'])} with another result")
    assert len(str(result["expected"])) == 64, result
    assert result["killed"] == 20
    assert result["wrong"] == []


# -------------------------------------------------------------------------------------------- saving, moment by moment


class Killed(BaseException):
    """Stands for the process's end: nothing catches it, and nothing is cleaned up."""


MOMENTS = ("before the marker", "after the marker", "after one file", "before the manifest")


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_save_cut_off_at_any_moment_leaves_the_old_model_or_a_folder_that_is_refused(
    packed_folder: Callable[..., Path], tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(packed_folder("llama"), tmp_path / "model")
    old = load(folder).state_dict()
    other = make_packed("llama", tmp_path / "bases", grid="int_sym")
    write_marker, replace, moves = save_module.write_marker, Path.replace, []

    def marker(target: Path) -> None:
        if moment != MOMENTS[0]:
            write_marker(target)
        if moment in MOMENTS[:2]:
            raise Killed

    def move(source: Path, target: Path) -> Path:
        if source.parent.name.startswith(".partial") and source.name != f"{save_module.MANIFEST_NAME}.tmp":
            moves.append(source.name)
            is_last = source.name == save_module.MANIFEST_NAME and target.parent == folder
            if (moment == MOMENTS[2] and len(moves) == 2) or (moment == MOMENTS[3] and is_last):
                raise Killed
        return replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(save_module, "write_marker", marker)
        patch.setattr(Path, "replace", move)
        patch.setattr(save_module.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Killed):
            other.save_pretrained(folder)
    if moment == MOMENTS[0]:
        found = load(folder).state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in old.items())
    else:
        with pytest.raises(CheckpointError, match="was interrupted while it replaced files"):
            load(folder)
        with pytest.raises(CheckpointError, match="was interrupted while it replaced files"):
            verify_checkpoint(folder)
    other.save_pretrained(folder)
    assert verify_checkpoint(folder)
    assert load(folder).config.quantization_config.grid == "int_sym"


def test_what_a_killed_save_left_behind_is_swept_by_the_next(
    packed_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = copy_of(packed_folder("llama"), tmp_path / "model")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for owner in (gone.pid, os.getpid()):
        (folder / f".partial-{owner}-x").mkdir()
        (folder / f".partial-{owner}-x" / WEIGHTS).write_bytes(b"half")
    load(folder).save_pretrained(folder)
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == [f".partial-{os.getpid()}-x"]


@contextlib.contextmanager
def disk_full_after(size: int) -> Iterator[None]:
    """No file may grow beyond a size."""
    limits, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_leaves_the_old_model_and_says_so(packed_folder: Callable[..., Path], tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writing past it fails in the same way."""
    folder = copy_of(packed_folder("llama"), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = make_packed("llama", tmp_path / "bases", bits=4)
    with disk_full_after(20_000), pytest.raises(CheckpointError, match=r"must have room.*model in memory is unchanged"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    model.save_pretrained(folder)
    assert load(folder).config.quantization_config.bits == 4


@pytest.mark.parametrize(
    ("stage", "size"),
    [("teacher_data", 300), ("teacher_cache", 2000), ("calibration", 30_000), ("distillation", 90_000)],
)
def test_a_stage_that_a_full_disk_stopped_goes_on_by_the_same_call(stage: str, size: int, tmp_path: Path) -> None:
    run, bases = STAGES[stage], tmp_path / "bases"
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    expected = run(bases, tmp_path / "whole")
    # what the Trainer itself writes fails with the errors of safetensors and of torch.save
    with disk_full_after(size), pytest.raises((CheckpointError, OSError, SafetensorError, RuntimeError)):
        run(bases, tmp_path / "stopped")
    assert run(bases, tmp_path / "stopped") == expected


def test_ctrl_c_during_a_save_cleans_up(
    packed_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(packed_folder("llama"), tmp_path / "model")
    names = sorted(path.name for path in folder.iterdir())
    model = load(folder)

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(save_module, "write_card", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == names
    assert verify_checkpoint(folder)
