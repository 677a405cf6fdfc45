"""Several processes train what one does, whoever holds the parameters: same weights, same figures, same gamma.

Every launch also goes on from its first checkpoint and compares bit for bit (`worker.py`), and packs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bitdistiller_peft.training import cache_teacher
from tests import tiny
from tests.training import helpers, worker
from tests.training.worker import Job

WORKER = Path(worker.__file__)
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


def launch(out: Path, bases: Path, job: Job, *, processes: int) -> dict[str, list[float]]:
    """Run the worker and read its figures."""
    out.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), str(WORKER), str(out), str(bases), job.text],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "figures.json").read_text())


@pytest.fixture(scope="module")
def cache(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers of the student's own base model, unrounded."""
    folder = tmp_path_factory.mktemp("cache") / "cache"
    documents = [worker.data(), worker.evaluation()]
    cache_teacher(helpers.base(bases), None, documents, folder, dtype="float32", show_progress=False)
    return folder


@pytest.fixture(scope="module")
def alone(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run of one process, by teacher and student, run once; a cached teacher says what "self" says."""
    folder = tmp_path_factory.mktemp("alone")
    for seed in (0, 1):
        tiny.save_base("llama", bases, seed=seed)  # before two processes would both write it

    def run(teacher: str, student: dict[str, str]) -> Path:
        teacher = "self" if teacher == "cached" else teacher
        place = folder / "-".join((teacher, *student.values()))
        if not place.exists():
            launch(place, bases, Job(size=2, teacher=teacher, student=student), processes=1)
        return place

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "teacher", "student"),
    [
        ("ddp", "self", {}),
        ("fsdp", "self", {}),
        ("fsdp", "separate", {"train_other": "all"}),
        ("fsdp-sharded", "cached", {"trainable": "lora"}),
        pytest.param("zero2", "self", {}, marks=needs_deepspeed),
        pytest.param("zero3", "self", {}, marks=needs_deepspeed),
        pytest.param("zero3", "cached", {}, marks=needs_deepspeed),
        pytest.param("zero3", "separate", {"train_other": "all"}, marks=needs_deepspeed),
    ],
)
def test_two_processes_train_what_one_does(
    bases: Path,
    tmp_path: Path,
    alone: Callable[..., Path],
    cache: Path,
    mode: str,
    teacher: str,
    student: dict[str, str],
) -> None:
    reference, out = alone(teacher, student), tmp_path / "two"
    one = json.loads((reference / "figures.json").read_text())
    job = Job(mode, teacher, student=student, cache=str(cache), again=1, pack=True)
    two = launch(out, bases, job, processes=2)
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    left, right = (load_file(folder / "weights.safetensors") for folder in (reference, out))
    assert helpers.difference(left, right) < 1e-5
    if mode not in ("ddp", "zero2"):
        one.pop("flip_rate")  # codes are counted on whole weights
    for key, values in one.items():
        assert values, key
        assert two[key] == pytest.approx(values, rel=1e-4, abs=1e-9), key
    assert_packed_as_alone(out, bases, student, tmp_path)


def assert_packed_as_alone(out: Path, bases: Path, student: dict[str, str], tmp_path: Path) -> None:
    """What was packed from all processes has the bytes of what one process packs of the same weights."""
    model = helpers.student(bases, **student)
    trained = load_file(out / "weights.safetensors")
    assert trained.keys() == helpers.weights(model).keys()
    model.load_state_dict(trained, strict=False)
    model.pack_and_unload(progressbar=False).save_pretrained(tmp_path / "packed")
    weights = (tmp_path / "packed" / "model.safetensors").read_bytes()
    assert (out / "packed" / "model.safetensors").read_bytes() == weights
    described = [
        json.loads((folder / "packed" / "config.json").read_text())["quantization_config"] for folder in (out, tmp_path)
    ]
    for config in described:
        del config["provenance"]  # of a run, and of none
    assert described[0] == described[1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp", "fsdp-sharded"])
def test_another_number_of_processes_goes_on(bases: Path, tmp_path: Path, mode: str) -> None:
    tiny.save_base("llama", bases)
    settings = {"gradient_accumulation_steps": 1}
    two = launch(tmp_path / "two", bases, Job(mode, size=3, steps=3, settings=settings), processes=2)
    job = Job(mode, size=2, steps=3, settings=settings, resume=str(tmp_path / "two" / "run" / "checkpoint-1"))
    three = launch(tmp_path / "three", bases, job, processes=3)
    assert (two.pop("processes"), three.pop("processes")) == (2, 3)
    assert not (tmp_path / "three" / "run" / "checkpoint-1").exists()  # it did not begin anew
    left, right = (load_file(tmp_path / name / "weights.safetensors") for name in ("two", "three"))
    assert helpers.difference(left, right) < 1e-5
    assert three["loss"] == pytest.approx(two["loss"], rel=1e-4)
