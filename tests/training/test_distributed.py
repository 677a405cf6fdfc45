"""Two processes train what one does: same weights, same figures, same gamma, also where a rank has no targets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import tiny
from tests.training import helpers

WORKER = Path(__file__).with_name("worker.py")


def launch(out: Path, bases: Path, *, processes: int, size: int) -> dict[str, list[float]]:
    """Run the worker and read its figures."""
    out.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(WORKER), str(out), str(bases), str(size)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "figures.json").read_text())


@pytest.mark.slow
def test_two_processes_train_what_one_does(bases: Path, tmp_path: Path) -> None:
    tiny.save_base("llama", bases)  # before two processes would both write it
    one = launch(tmp_path / "one", bases, processes=1, size=2)
    two = launch(tmp_path / "two", bases, processes=2, size=1)
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    left, right = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    assert helpers.difference(left, right) < 1e-6
    for key, values in one.items():
        assert values, key
        assert two[key] == pytest.approx(values, rel=1e-4, abs=1e-9), key
