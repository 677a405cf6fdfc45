"""One rank of a distributed run: `python -m torch.distributed.run ... worker.py OUT BASES SIZE MODE TEACHER`.

Trains two steps on the standard data and writes weights and figures of rank 0. MODE is ``ddp`` or ``fsdp``, TEACHER
``self`` or ``separate``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import accelerate
import datasets
import torch
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.training import helpers

KEYS = ("loss", "forward_kl", "ce", "confidence", "num_tokens", "gamma", "flip_rate", "eval_loss", "eval_forward_kl")


def allow_fsdp_on_cpus() -> None:
    """Let accelerate shard on CPUs: it only upgrades the backends of accelerators, and would run DDP without a word."""
    original = accelerate.state.AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    accelerate.state.AcceleratorState.__init__ = init


def main(out: Path, bases: Path, size: int, mode: str = "ddp", teacher: str = "self") -> None:
    """Run and write `weights.safetensors` and `figures.json`."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    sharding: dict[str, Any] = {}
    if mode == "fsdp":
        allow_fsdp_on_cpus()
        # codes are counted on whole weights only
        layer = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        sharding = {"fsdp": True, "fsdp_config": layer, "eval_strategy": "no"}
    rows = helpers.dataset(16)
    silent = rows.map(
        lambda row, i: {"labels": row["labels"] if i % 2 else [-100] * len(row["labels"])}, with_indices=True
    )
    run = helpers.trainer(
        helpers.student(bases),
        out / "run",
        data=silent,  # whole micro-batches, and with them ranks, without a target
        eval_data=helpers.dataset(8, seed=4),
        teacher=helpers.base(bases, seed=1) if teacher == "separate" else None,
        max_length=None,
        gamma="estimate",
        gamma_num_batches=2,
        per_device_train_batch_size=size,
        per_device_eval_batch_size=size,
        gradient_accumulation_steps=4,
        save_strategy="steps",
        save_steps=1,
        **sharding,
    )
    run.train()
    run.evaluate()
    if mode == "fsdp":
        check_sharded(run.model)
        if teacher == "separate":
            check_sharded(run.teacher.model)
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in run.model.named_parameters()
        if p.requires_grad
    }
    if run.is_world_process_zero():
        save_file(weights, out / "weights.safetensors")
        figures = {key: helpers.history(run, key) for key in KEYS}
        (out / "figures.json").write_text(json.dumps(figures | {"processes": run.accelerator.num_processes}))


def check_sharded(model: torch.nn.Module) -> None:
    """Refuse a run that was not sharded after all; it would pass for the wrong reason."""
    layers = [(name, parameter) for name, parameter in model.named_parameters() if ".layers." in name]
    whole = [name for name, parameter in layers if not isinstance(parameter, DTensor)]
    if whole:
        raise SystemExit(f"not sharded: {whole}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
