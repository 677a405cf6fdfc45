"""One rank of a distributed run: `python -m torch.distributed.run ... worker.py OUT BASES JOB`.

Trains on the standard data, and writes weights and figures of rank 0. JOB is a `Job` as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import datasets
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[2]))

from bitdistiller_peft.layers import gathered, whole
from bitdistiller_peft.training import DistillTrainer
from tests.training import helpers

KEYS = ("loss", "forward_kl", "ce", "confidence", "num_tokens", "gamma", "flip_rate", "eval_loss", "eval_forward_kl")
ZERO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


@dataclass(frozen=True)
class Job:
    """What is run. `mode` is ddp, fsdp, fsdp-sharded (its checkpoints are), zero2 or zero3; `size` is per process."""

    mode: str = "ddp"
    teacher: str = "self"
    size: int = 1
    steps: int = 2
    base: str = "llama"
    student: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    resume: str | None = None
    """a checkpoint to go on from"""
    again: int | None = None
    """train once more from the checkpoint of this step, and compare bit for bit"""
    pack: bool = False
    cache: str | None = None

    @property
    def text(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))


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


def sharding(mode: str) -> dict[str, Any]:
    """What the trainer's config is to say."""
    kind, _, also = mode.partition("-")
    if kind == "fsdp":
        allow_fsdp_on_cpus()
        layer = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        kept = {"state_dict_type": "SHARDED_STATE_DICT"} if also == "sharded" else {}
        return {"fsdp": True, "fsdp_config": layer | kept}
    if kind.startswith("zero"):
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        stage: dict[str, Any] = {"stage": int(kind[-1])}
        if kind == "zero3":  # these models are so small that ZeRO would keep them whole
            kept = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance")
            stage |= {"stage3_gather_16bit_weights_on_model_save": True, **{f"stage3_{name}": 0 for name in kept}}
        return {"deepspeed": {**ZERO, "zero_optimization": stage}}
    return {}


def data() -> Dataset:
    """Rows of which every second has no target, so whole micro-batches, and with them ranks, are without one."""
    return helpers.dataset(24).map(
        lambda row, i: {"labels": row["labels"] if i % 2 else [-100] * len(row["labels"])}, with_indices=True
    )


def evaluation() -> Dataset:
    """Other rows."""
    return helpers.dataset(8, seed=4)


def build(job: Job, folder: Path, bases: Path) -> DistillTrainer:
    """The trainer of this rank."""
    set_seed(0)
    settings = {
        "max_length": None,
        "learning_rate": 1e-3,
        "optim": "adamw_torch",  # it has a state to resume
        "adam_epsilon": 0.01,  # smooth: a gradient that is all but zero must not decide by its sign
        "gamma": "estimate",
        "gamma_num_batches": 2,
        "per_device_train_batch_size": job.size,
        "per_device_eval_batch_size": job.size,
        "gradient_accumulation_steps": 4,
        "max_steps": job.steps,
        "save_strategy": "steps",
        "save_steps": 1,
        **({"teacher": "cached", "teacher_cache": job.cache} if job.teacher == "cached" else {}),
        **sharding(job.mode),
        **job.settings,
    }
    args = helpers.config(folder, **settings)
    if job.mode == "zero3":  # from now on, models are loaded in parts; transformers itself does so on a GPU only
        import deepspeed

        deepspeed.init_distributed(args.ddp_backend or "gloo")
    return DistillTrainer(
        helpers.student(bases, job.base, **job.student),
        args,
        teacher=helpers.base(bases, job.base, seed=1) if job.teacher == "separate" else None,
        train_dataset=data(),
        eval_dataset=evaluation(),
        processing_class=helpers.tokenizer(),
    )


def check_launched(run: DistillTrainer, job: Job) -> None:
    """Refuse a run that was not spread as it was asked; it would pass for the wrong reason."""
    if run.accelerator.num_processes == 1:
        return
    if job.mode.startswith("zero") and run.model_wrapped.zero_optimization_stage() != int(job.mode[-1]):
        raise SystemExit("DeepSpeed is not at work")
    if job.mode not in ("ddp", "zero2"):
        check_sharded(run.model, job.mode)
        if job.teacher == "separate":
            check_sharded(run.teacher.model, job.mode)


def check_sharded(model: torch.nn.Module, mode: str) -> None:
    """Refuse a model that this process holds whole."""
    parts = [name for name, parameter in model.named_parameters() if is_part(parameter, mode)]
    layers = [name for name, _ in model.named_parameters() if ".layers." in name]
    if not layers or not set(layers) <= set(parts):
        raise SystemExit(f"not sharded: {sorted(set(layers) - set(parts))}")
    for module in model.modules():  # what is left whole after a forward pass: the last norm and the head
        if isinstance(module, FSDPModule):
            module.reshard()
    left = [name for name, parameter in model.named_parameters() if not is_part(parameter, mode)]
    if left:
        raise SystemExit(f"not sharded: {left}")


def is_part(parameter: torch.Tensor, mode: str) -> bool:
    """Whether this rank holds only a part of a parameter."""
    if mode.startswith("fsdp"):
        return isinstance(parameter, DTensor) and parameter.to_local().numel() < parameter.numel()
    return parameter.numel() == 0 and parameter.ds_tensor.numel() < parameter.ds_numel


def run_once(job: Job, folder: Path, bases: Path, resume: str | None) -> tuple[DistillTrainer, dict[str, Any]]:
    """Train and evaluate: the trainer, its figures and its weights."""
    run = build(job, folder, bases)
    run.train(resume_from_checkpoint=resume)
    run.evaluate()
    check_launched(run, job)
    return run, {key: helpers.history(run, key) for key in KEYS}


def main(out: Path, bases: Path, job: Job) -> None:
    """Run and write `weights.safetensors`, `figures.json` and, if asked, the packed model."""
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    run, figures = run_once(job, out / "run", bases, job.resume)
    weights = whole_weights(run.model)
    if job.again is not None:
        second, figures_again = run_once(job, out / "run-again", bases, str(out / "run" / f"checkpoint-{job.again}"))
        if (out / "run-again" / f"checkpoint-{job.again}").exists():
            raise SystemExit("the run that should go on began anew")
        difference = helpers.difference(weights, whole_weights(second.model))
        if difference != 0.0 or figures_again["loss"] != figures["loss"]:
            raise SystemExit(f"the run that went on differs by {difference}: {figures_again['loss']}")
    if job.pack:
        packed = run.model.pack_and_unload()
        if run.is_world_process_zero():
            packed.save_pretrained(out / "packed")
    if run.is_world_process_zero():
        save_file(weights, out / "weights.safetensors")
        (out / "figures.json").write_text(json.dumps(figures | {"processes": run.accelerator.num_processes}))


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What is trained, put together from all ranks."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with gathered(trained.values()):
        return {name: whole(parameter).detach().clone() for name, parameter in trained.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Job(**json.loads(sys.argv[3])))
