"""Two processes train what one does: same weights, same figures, same gamma, also where a rank has no targets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import tiny
from tests.training import helpers

WORKER = Path(__file__).with_name("worker.py")


def launch(
    out: Path, bases: Path, *, processes: int, size: int, mode: str = "ddp", teacher: str = "self"
) -> dict[str, list[float]]:
    """Run the worker and read its figures."""
    out.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    options = [str(out), str(bases), str(size), mode, teacher]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), str(WORKER), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "figures.json").read_text())


@pytest.fixture(scope="module")
def alone(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of one process, by teacher, run once."""
    folder = tmp_path_factory.mktemp("alone")
    for seed in (0, 1):
        tiny.save_base("llama", bases, seed=seed)  # before two processes would both write it

    def run(teacher: str) -> Path:
        if not (folder / teacher).exists():
            launch(folder / teacher, bases, processes=1, size=2, teacher=teacher)
        return folder / teacher

    return run


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["self", "separate"])
@pytest.mark.parametrize("mode", ["ddp"])
def test_two_processes_train_what_one_does(
    bases: Path, tmp_path: Path, alone: Callable[[str], Path], mode: str, teacher: str
) -> None:
    reference = alone(teacher)
    one = json.loads((reference / "figures.json").read_text())
    two = launch(tmp_path / "two", bases, processes=2, size=1, mode=mode, teacher=teacher)
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    left, right = (load_file(folder / "weights.safetensors") for folder in (reference, tmp_path / "two"))
    assert helpers.difference(left, right) < 1e-5
    if mode == "fsdp":
        one.pop("flip_rate")  # codes are counted on whole weights
    for key, values in one.items():
        assert values, key
        assert two[key] == pytest.approx(values, rel=1e-4, abs=1e-9), key
