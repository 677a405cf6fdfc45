"""Processes that share the calibration text find what one finds with all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitdistiller_peft.calibration.capture import Gram
from bitdistiller_peft.calibration.ranks import share_of
from tests import tiny
from tests.calibration import ranks_worker
from tests.sharding import process_group


def test_one_process_has_all_of_it(generator: torch.Generator) -> None:
    batches = [torch.zeros(1, 4), torch.ones(1, 4)]
    with process_group():
        share = share_of(batches)
        assert (len(share.batches), share.first, share.is_part) == (2, 0, False)
        seen, empty, alone = Gram(4), Gram(4), Gram(4)
        inputs = torch.randn(3, 8, generator=generator)
        for gram in (seen, alone):
            gram.add(inputs)
        for gram in (seen, empty):
            gram.add_up(2, inputs.device)
    assert torch.equal(seen.mean(), alone.mean())
    assert empty.mean() is None


@pytest.mark.parametrize(("rank", "own", "first"), [(0, [0, 3], 0), (1, [0, 1, 4], 1), (2, [0, 2], 1)])
def test_batches_are_dealt_out_and_all_begin_with_the_same(
    monkeypatch: pytest.MonkeyPatch, rank: int, own: list[int], first: int
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    share = share_of([torch.tensor([number]) for number in range(5)])
    assert ([int(batch) for batch in share.batches], share.first, share.is_part) == (own, first, True)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [("llama", "clip"), ("llama", "gptq"), ("qwen3-moe", "clip")])
def test_two_processes_pack_what_one_packs(models: Path, tmp_path: Path, name: str, method: str) -> None:
    tiny.save_base(name, models)
    ran = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        done = subprocess.run(
            [sys.executable, *launcher, ranks_worker.__file__, str(out), str(models), name, method],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        ran[processes] = int((out / "ran").read_text())
    one, two = ((tmp_path / str(n) / "packed" / "model.safetensors").read_bytes() for n in (1, 2))
    assert one == two
    assert ran[2] < ran[1]  # the work was shared
