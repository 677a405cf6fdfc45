"""What the tests of the socket share: students, packed models, their files, and fresh processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from bitdistiller_peft import BitDistillerConfig, get_bitdistiller_model
from bitdistiller_peft.hub import MANIFEST_NAME
from bitdistiller_peft.layers import PackedExperts, PackedLinear
from tests.tiny import load, save_base, token_ids

ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"


class Saved(NamedTuple):
    """A packed model as it is in memory, on disk, and in its answers."""

    folder: Path
    model: PreTrainedModel
    logits: torch.Tensor


def make_student(
    arch: str, folder: Path, *, dtype: torch.dtype = torch.float32, steps: int = 1, **config: Any
) -> PeftModel:
    """A student after a training step or none, in evaluation mode."""
    config = {"group_size": 32, **config}
    model = get_bitdistiller_model(load(save_base(arch, folder, dtype=dtype)), BitDistillerConfig(**config))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = token_ids()
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def make_packed(arch: str, folder: Path, **settings: Any) -> PreTrainedModel:
    """A packed model, trained for a step."""
    return make_student(arch, folder, **settings).pack_and_unload(progressbar=False)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=token_ids()).logits


def packed_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that hold packed weights, experts included."""
    return [module for module in model.modules() if isinstance(module, (PackedLinear, PackedExperts))]


def assert_same_state(found: nn.Module, expected: nn.Module) -> None:
    """Equal names, dtypes and bits of everything that `state_dict()` holds."""
    ours, theirs = found.state_dict(), expected.state_dict()
    assert sorted(ours) == sorted(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def copy_of(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    return Path(shutil.copytree(folder, target))


def edit_tensors(folder: Path, changes: Mapping[str, torch.Tensor | None], *, keep_manifest: bool = False) -> None:
    """Replace (or with `None` drop) tensors of a one-file checkpoint; without its manifest, so that values are read."""
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in changes.items():
        assert tensor is None or name in tensors
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if not keep_manifest:
        (folder / MANIFEST_NAME).unlink()


def edit_config(folder: Path, **changes: Any) -> None:
    """Change entries of the quantization config in config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config), encoding="utf-8")


def run_python(code: str, *args: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, offline, with as many threads as this one."""
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        input=stdin,
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
