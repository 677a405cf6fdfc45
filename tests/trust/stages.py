"""The stages of the pipeline, each a function that starts or goes on by itself, and the process that kills them.

``python -m tests.trust.stages SEED COUNT FOLDER STAGE...`` forks itself for each stage: twice uninterrupted, then
killed after a random time and called again with the same arguments, until COUNT kills have hit. It prints one line of
JSON for each stage.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bitdistiller_peft  # noqa: F401
from bitdistiller_peft.calibration import calibrate
from bitdistiller_peft.errors import CheckpointError
from bitdistiller_peft.hub import verify_checkpoint
from bitdistiller_peft.training import cache_teacher, generate_teacher_data
from tests.hub.models import make_packed
from tests.tiny import load, token_ids
from tests.training import helpers

STEPS = 4


def digest_of(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode() + tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def digest_of_files(folder: Path, *patterns: str) -> str:
    """SHA-256 over names and bytes of some files; nothing that was begun may lie beside them."""
    sha = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        sha.update(path.name.encode() + path.read_bytes())
    left = [path.name for path in folder.iterdir() if path.name.startswith(".partial") or path.suffix == ".tmp"]
    return sha.hexdigest() + "".join(left)


def teacher_data(bases: Path, folder: Path) -> str:
    """Answers of the teacher, batch by batch."""
    prompts = [f"w{i} w{i + 1} w{i + 2}" for i in range(12)]
    base = helpers.base(bases)
    target = folder / "teacher"
    settings = {"max_new_tokens": 8, "batch_size": 2, "show_progress": False}
    generate_teacher_data(base, helpers.tokenizer(), prompts, output_dir=target, **settings)
    return digest_of_files(target, "teacher_data.jsonl")


def teacher_cache(bases: Path, folder: Path) -> str:
    """What the teacher says of documents, shard by shard."""
    data, target = helpers.dataset(48), folder / "cache"
    settings = {"batch_size": 2, "shard_bytes": 2048, "show_progress": False}
    cache_teacher(helpers.base(bases), helpers.tokenizer(), data, target, **settings).verify()
    return digest_of_files(target, "*.safetensors", "*.json")


def calibrated(bases: Path, folder: Path, method: str, **options: Any) -> str:
    """The student's weights and the ranges that a calibration leaves."""
    model = helpers.student(bases)
    path = folder / "calibration.safetensors"
    ids = token_ids(batch=4, length=16)
    options = {"batch_size": 2, "show_progress": False, "output_path": path, **options}
    found = calibrate(model, None, ids, method=method, **options).load(path)
    ends = {f"{name} {i}": end for name, ends in found.ranges.items() for i, end in enumerate(ends)}
    return digest_of(helpers.weights(model) | ends)


def calibration(bases: Path, folder: Path) -> str:
    """A block-wise reconstruction, block by block."""
    return calibrated(bases, folder, "blockwise", resume_dir=folder / "blocks", epochs=4)


def distillation(bases: Path, folder: Path) -> str:
    """A run with a checkpoint after every step; called again, it goes on by itself."""
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    run = helpers.trainer(helpers.student(bases), folder / "run", **settings)
    run.train(resume_from_checkpoint="auto")
    return digest_of(helpers.weights(run.model))


def packing(bases: Path, folder: Path) -> str:
    """A packed model, in shards, over an older one; between, the folder holds the older one or is refused."""
    target = folder / "packed"
    if (target / "config.json").exists():
        with contextlib.suppress(CheckpointError):
            load(target)
    else:
        make_packed("llama", bases, steps=0).save_pretrained(target)
    make_packed("llama", bases, steps=1).save_pretrained(target, max_shard_size="20KB")
    verify_checkpoint(target)
    return digest_of_files(target, "*.safetensors", "*.json")


STAGES: dict[str, Callable[[Path, Path], str]] = {
    "teacher_data": teacher_data,
    "teacher_cache": teacher_cache,
    "calibration": calibration,
    "distillation": distillation,
    "packing": packing,
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
    if not os.WIFSIGNALED(status):
        return "", False
    return whole(stage, bases, folder)[0], True


def main(seed: int, count: int, folder: Path, stages: list[str]) -> None:
    """Kill each stage so often, in turn, say every outcome on stderr, and print what became of each."""
    torch.set_num_threads(1)
    rng, bases = random.Random(seed), folder / "bases"
    lines: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    for stage in stages:
        expected, _ = whole(stage, bases, folder / stage / "first")
        again, seconds[stage] = whole(stage, bases, folder / stage / "second")
        lines[stage] = {"stage": stage, "expected": expected, "repeated": again, "killed": 0, "missed": 0, "wrong": []}
    for number in range(10 * count):
        for stage, line in lines.items():
            if line["killed"] == count:
                continue
            target, moment = folder / stage / str(number), rng.uniform(0.0, seconds[stage])
            result, was_killed = kill_and_go_on(stage, bases, target, moment)
            shutil.rmtree(target, ignore_errors=True)
            line["killed" if was_killed else "missed"] += 1
            line["wrong"] += [result] if was_killed and result != line["expected"] else []
            print(f"{stage}: killed={was_killed} after {moment:.2f} s, {result[:80]}", file=sys.stderr, flush=True)
    for line in lines.values():
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
