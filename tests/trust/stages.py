"""The stages of the pipeline, each a function that starts or goes on by itself, and the process that kills them.

``python -m tests.trust.stages SEED COUNT FOLDER STAGE...`` forks itself for each stage: once uninterrupted, then COUNT
times killed after a random time and called again with the same arguments. It prints one line of JSON for each stage.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import bitdistiller_peft  # noqa: F401
from bitdistiller_peft.calibration import calibrate
from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.hub import verify_checkpoint
from bitdistiller_peft.training import generate_teacher_data
from bitdistiller_peft.training.checkpoints import resumable
from tests.hub.models import WEIGHTS, make_packed
from tests.tiny import load, token_ids
from tests.training import helpers

STEPS = 4


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def teacher_data(bases: Path, folder: Path) -> str:
    """Answers of the teacher, batch by batch."""
    prompts = [f"w{i} w{i + 1} w{i + 2}" for i in range(12)]
    base = helpers.base(bases)
    generate_teacher_data(
        base,
        helpers.tokenizer(),
        prompts,
        output_dir=folder / "teacher",
        max_new_tokens=8,
        batch_size=2,
        show_progress=False,
    )
    return hashlib.sha256((folder / "teacher" / "teacher_data.jsonl").read_bytes()).hexdigest()


def calibration(bases: Path, folder: Path) -> str:
    """A clip search, whose result is a file; it starts anew."""
    model = helpers.student(bases)
    path = folder / "calibration.safetensors"
    ids = token_ids(batch=4, length=16)
    result = calibrate(model, None, ids, method="clip", batch_size=2, show_progress=False, output_path=path)
    return digest_of({f"{n} {i}": end for n, ends in result.load(path).ranges.items() for i, end in enumerate(ends)})


def distillation(bases: Path, folder: Path) -> str:
    """A run with a checkpoint after every step."""
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    run = helpers.trainer(helpers.student(bases), folder / "run", **settings)
    try:
        start = resumable(True, str(folder / "run"))
    except CheckpointError:  # none is whole yet
        start = None
    run.train(resume_from_checkpoint=start)
    return digest_of(helpers.weights(run.model))


def saving(bases: Path, folder: Path) -> str:
    """A packed model over an older one; between, the folder holds the older one or is refused."""
    target = folder / "packed"
    if (target / "config.json").exists():
        with contextlib.suppress(CheckpointError):
            load(target)
    else:
        make_packed("llama", bases, steps=0).save_pretrained(target)
    make_packed("llama", bases, steps=1).save_pretrained(target, max_shard_size="20KB")
    verify_checkpoint(target)
    left = [path.name for path in target.iterdir() if path.name.startswith(".partial") or path.name == WEIGHTS]
    return digest_of(load(target).state_dict()) + "".join(left)


STAGES: dict[str, Callable[[Path, Path], str]] = {
    "teacher_data": teacher_data,
    "calibration": calibration,
    "distillation": distillation,
    "saving": saving,
}


def fork(stage: str, bases: Path, folder: Path) -> int:
    """Run a stage in a child, which leaves its digest in a file."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "digest").write_text(STAGES[stage](bases, folder), encoding="utf-8")
        code = 0
    except BaseException as error:  # noqa: BLE001
        (folder / "error").write_text(repr(error), encoding="utf-8")
    finally:
        os._exit(code)


def whole(stage: str, bases: Path, folder: Path) -> tuple[str, float]:
    """An uninterrupted call: its digest (or its error), and its time."""
    started = time.monotonic()
    _, status = os.waitpid(fork(stage, bases, folder), 0)
    found = folder / ("digest" if status == 0 else "error")
    return found.read_text(encoding="utf-8") if found.exists() else f"status {status}", time.monotonic() - started


def kill_and_go_on(stage: str, bases: Path, folder: Path, seconds: float) -> tuple[str, bool]:
    """Kill a call after some seconds, and call again: the digest, and whether there was anything to kill."""
    child = fork(stage, bases, folder)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return whole(stage, bases, folder)[0], os.WIFSIGNALED(status)


def main(seed: int, count: int, folder: Path, stages: list[str]) -> None:
    """Print what became of each stage."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    for stage in stages:
        expected, _ = whole(stage, folder / "bases", folder / stage / "first")
        again, seconds = whole(stage, folder / "bases", folder / stage / "second")
        outcomes = [
            kill_and_go_on(stage, folder / "bases", folder / stage / str(n), rng.uniform(0.0, seconds))
            for n in range(count)
        ]
        line = {
            "stage": stage,
            "expected": expected,
            "repeated": again,
            "killed": sum(killed for _, killed in outcomes),
            "wrong": sorted({result for result, _ in outcomes if result != expected}),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
