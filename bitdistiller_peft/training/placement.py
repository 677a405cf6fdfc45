"""Where the teacher lives: in the student, beside it, in a few bits, in main memory, or on the disk."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator, cpu_offload
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.training.cache_store import TeacherCache
from bitdistiller_peft.training.cached import CachedTeacher
from bitdistiller_peft.training.config import CACHED, OFFLOAD, QUANTIZED, DistillConfig
from bitdistiller_peft.training.forward import base_model_of
from bitdistiller_peft.training.heads import output_head
from bitdistiller_peft.training.teachers import SelfTeacher, SeparateTeacher, Teacher


def build_teacher(
    teacher: str | nn.Module, student: nn.Module, accelerator: Accelerator, args: DistillConfig
) -> Teacher:
    """Make a teacher of what the user said.

    Args:
        teacher: `"self"`, `"cached"`, `"quantized"`, `"offload"`, a path or Hub name, or a loaded model.
        student: the model to be trained.
        accelerator: says how models are placed.
        args: `teacher_cache`, `teacher_init_kwargs`, and what is to be minimized.

    Raises:
        ConfigError: the teacher does not suit; the message says why.
        CheckpointError, StateError: the cache is damaged or not complete.
    """
    if isinstance(teacher, str) and teacher == "self":
        return SelfTeacher(student)
    if isinstance(teacher, str) and teacher == CACHED:
        if args.teacher_cache is None:
            raise ConfigError(
                "`teacher_cache` must be given with teacher='cached': got None. Name cache_teacher's folder."
            )
        return CachedTeacher(TeacherCache(args.teacher_cache), student, args.objective(0.5))
    if isinstance(teacher, str):
        return _loaded(teacher, student, accelerator, args.teacher_kwargs)
    _check(teacher, student)
    return _placed(teacher, accelerator)


def _loaded(teacher: str, student: nn.Module, accelerator: Accelerator, init_kwargs: Mapping[str, Any]) -> Teacher:
    """Load a teacher by name, and put it where its placement says."""
    placement, _, name = teacher.partition(":")
    if placement not in (QUANTIZED, OFFLOAD):
        placement, name = "", teacher
    name = name or _base_name(student, teacher)
    if placement == QUANTIZED:
        init_kwargs = _in_few_bits(init_kwargs, accelerator)
    model = AutoModelForCausalLM.from_pretrained(name, **{"dtype": "auto", **init_kwargs})
    _check(model, student)
    if placement == OFFLOAD:
        return SeparateTeacher(_offloaded(model, accelerator), f"{name} (offloaded)")
    if placement == QUANTIZED:
        bits = 4 if init_kwargs["quantization_config"].load_in_4bit else 8
        return SeparateTeacher(model, f"{name} (in {bits} bits)")
    return _placed(model, accelerator)


def _base_name(student: nn.Module, teacher: str) -> str:
    name = str(getattr(base_model_of(student).config, "_name_or_path", "") or "")
    if not name:
        raise ConfigError(
            f"`teacher` must name a model where the student's base was built in memory: got teacher={teacher!r}. "
            f"Use '{teacher}:PATH'."
        )
    return name


def _in_few_bits(init_kwargs: Mapping[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """Move what is for bitsandbytes into its config; 8 bits where nothing is said."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "`teacher` must not be 'quantized' without bitsandbytes: it is not installed. Run pip install "
            "bitsandbytes, or use 'self' or 'cached'."
        )
    _refuse_sharding(QUANTIZED, accelerator)
    own = {name: value for name, value in init_kwargs.items() if name.startswith(("load_in_", "bnb_", "llm_int8_"))}
    rest = {name: value for name, value in init_kwargs.items() if name not in own}
    config = BitsAndBytesConfig(
        **own if any(own.get(f"load_in_{b}bit") for b in (4, 8)) else own | {"load_in_8bit": True}
    )
    return {"device_map": {"": accelerator.device}, "quantization_config": config, **rest}


def _offloaded(model: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """Keep the backbone in main memory and stream it through the device, layer by layer; the head stays there."""
    _refuse_sharding(OFFLOAD, accelerator)
    backbone = model.base_model
    weights = {name: tensor.to("cpu") for name, tensor in backbone.state_dict().items()}
    head = model.get_output_embeddings()
    if head is not None:
        head.to(accelerator.device)
    cpu_offload(backbone, execution_device=accelerator.device, state_dict=weights)
    return model


def _refuse_sharding(placement: str, accelerator: Accelerator) -> None:
    if getattr(accelerator.state, "fsdp_plugin", None) is not None or zero_stage(accelerator) == 3:
        raise ConfigError(
            f"`teacher` must not be {placement!r} under FSDP and ZeRO-3: the shards of other ranks could not be put "
            "together. "
            "Use 'self', 'cached', or a path, which is sharded as the student is."
        )


def _check(teacher: object, student: nn.Module) -> None:
    if teacher is student or teacher is base_model_of(student):
        raise ConfigError(
            "`teacher` must be another model than the student: got the student itself. Use teacher='self'."
        )
    if not isinstance(teacher, (PreTrainedModel, PeftModel)):
        raise ConfigError(
            f"`teacher` must be 'self', a path or a transformers model: got {type(teacher).__name__}. Use 'self'."
        )
    theirs, ours = (_vocabulary(model) for model in (teacher, student))
    if theirs != ours:
        raise ConfigError(
            f"`teacher` must have the student's vocabulary: got {theirs} tokens for the teacher and {ours} for the "
            "student. Use a teacher of the same family, or resize its embeddings if only the padding differs."
        )


@torch.no_grad()
def _vocabulary(model: nn.Module) -> int:
    base = base_model_of(model)
    out_features = getattr(base.get_output_embeddings(), "out_features", None)
    return int(out_features) if out_features is not None else len(output_head(base).weight)


def _placed(teacher: PreTrainedModel | PeftModel, accelerator: Accelerator) -> SeparateTeacher:
    """Put the teacher where the student is: in parts under FSDP2 and ZeRO-3, else whole on this process's device."""
    if getattr(accelerator.state, "fsdp_plugin", None) is not None:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        return SeparateTeacher(fsdp2_prepare_model(accelerator, teacher))
    if zero_stage(accelerator) == 3:
        return SeparateTeacher(teacher, forward=_in_zero3(teacher.eval().requires_grad_(False), accelerator))
    if getattr(teacher, "hf_device_map", None) is None:
        teacher.to(accelerator.device)
    return SeparateTeacher(teacher)


def _in_zero3(teacher: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Hand the teacher to an engine of its own, which has parameters, gathered layer by layer, and nothing else."""
    import deepspeed

    stage = {**_sharing_of(accelerator), "stage": 3}
    dtype = next(teacher.parameters()).dtype
    engine, *_ = deepspeed.initialize(
        model=teacher,
        config={
            "train_micro_batch_size_per_gpu": 1,  # asked for; nothing is trained
            "zero_optimization": stage,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "fp16": {"enabled": dtype == torch.float16},
        },
    )
    return engine


def _sharing_of(accelerator: Accelerator) -> dict[str, Any]:
    """How the student's parameters are offloaded and kept, so are the teacher's."""
    zero = accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
    return {k: v for k, v in zero.items() if v != "auto" and (k == "offload_param" or k.startswith("stage3_"))}


def zero_stage(accelerator: Accelerator) -> int:
    """The stage of DeepSpeed's ZeRO that is in force; 0 without DeepSpeed."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else int(plugin.zero_stage)
