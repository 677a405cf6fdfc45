"""`distill` in several processes: all train one student, and one result, one packed model and one voice come of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitdistiller_peft.cli import output
from bitdistiller_peft.cli.verb import Console
from bitdistiller_peft.hub import verify_checkpoint


def test_only_the_first_process_speaks_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank, expected in (("1", []), ("0", ["a.txt"])):
        monkeypatch.setenv("RANK", rank)
        console = Console(is_json=True)
        console.say("said"), console.note("noted"), console.finish({"a": 1})
        output.write_atomically(tmp_path / "a.txt", "text")
        assert [path.name for path in tmp_path.iterdir()] == expected
        out, err = capsys.readouterr()
        assert (out, err) == (("", "") if rank == "1" else ('{\n  "a": 1\n}\n', "said\nnoted\n"))


@pytest.mark.slow
def test_two_processes_make_one_packed_model(base: Path, files: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "bitdistiller_peft", "distill", "--model", str(base), "--data", str(files / "text.txt")]
    command += ["--group-size", "32", "--output", str(tmp_path / "out"), "--device", "cpu", "--max-steps", "2"]
    command += ["--max-length", "64", "--per-device-train-batch-size", "1", "--ddp-backend", "gloo", "--bf16=false"]
    for words in ("packed model:", "distilled before:"):  # the second time it is there
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=600, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count(words) == 1
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["steps"], result["packed"]) == (2, str(tmp_path / "out" / "packed"))
    assert len(verify_checkpoint(tmp_path / "out" / "packed")) == 1
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.startswith(".partial")]
