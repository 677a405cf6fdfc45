"""What is refused before the first step, each with what to do instead."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import nn

from bitdistiller_peft.errors import ConfigError, DataError
from bitdistiller_peft.kernels import LOAD_IN_FP32, warn_of_slow_bf16
from bitdistiller_peft.losses import IGNORE_INDEX
from bitdistiller_peft.training.config import DistillConfig
from bitdistiller_peft.training.metrics import trained_weights
from bitdistiller_peft.tuner.overlays import BitDistillerTiedHead

_SAMPLED_WEIGHTS = 16


def check_dataset(dataset: Any, name: str = "train_dataset") -> None:
    """Refuse a dataset without a single example.

    Raises:
        DataError: it is missing or empty.
    """
    if dataset is None or (isinstance(dataset, Sized) and len(dataset) == 0):
        raise DataError(f"`{name}` must hold examples: got {'None' if dataset is None else 'an empty dataset'}.")


def check_targets(dataset: Any) -> None:
    """Refuse prepared data in which nothing is to be learned.

    Args:
        dataset: as `SFTTrainer` prepared it; streams are not looked at.

    Raises:
        DataError: no example has a target token.
    """
    if not isinstance(dataset, Sized):
        return
    columns = getattr(dataset, "column_names", None) or []
    if len(dataset) and "labels" not in columns:
        return  # made by the collator
    has_target = any(any(label != IGNORE_INDEX for label in row["labels"][1:]) for row in dataset)  # type: ignore[attr-defined]
    if not has_target:
        raise DataError(
            "`train_dataset` must hold target tokens: got none in any example after tokenizing, masking and cutting "
            "to max_length. Raise max_length (prompts may fill it), or check completions and labels."
        )


def check_student(model: nn.Module) -> None:
    """Refuse a student that is not quantized, or whose quantized weights are frozen or merged.

    Raises:
        ConfigError: it would train something else than a quantized model.
    """
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ConfigError("`model` must not use prompt learning: its virtual tokens would put the teacher out of step.")
    weights = trained_weights(model)
    if not weights:
        raise ConfigError(
            f"`model` must have fake-quantized weights in force: got {type(model).__name__} with none. Build it with "
            "get_bitdistiller_model(model, config), and do not merge or disable the adapter before training."
        )
    if not any(parameter.requires_grad for module, _, _ in weights for parameter in module.parameters(recurse=False)):
        raise ConfigError(
            "`model` must have trainable quantized weights: all are frozen. Load the adapter with is_trainable=True."
        )


def check_master_dtype(model: nn.Module, args: DistillConfig) -> None:
    """Refuse half-precision master weights that the learning rate cannot move.

    Raises:
        ConfigError: half the weights could not move; the smallest learning rate that works is named.
    """
    smallest = smallest_learning_rate(model)
    if smallest is not None and args.learning_rate < smallest:
        dtype = _half_masters(model)[0].dtype
        raise ConfigError(
            f"`learning_rate` must be at least {smallest:.1e} for master weights in {dtype}: got "
            f"learning_rate={args.learning_rate:.1e}. Most updates would be rounded away. Use master_dtype='float32' "
            "(and leave PEFT's autocast_adapter_dtype on), which works at any learning rate."
        )


def smallest_learning_rate(model: nn.Module) -> float | None:
    """The learning rate from which on half of the half-precision master weights move; None where there are none.

    An Adam step is about as large as the learning rate. Added to a bf16 weight `w`, it is rounded away where it is
    smaller than half a step of the format, `|w| * 2**-8` at most.
    """
    half = _half_masters(model)
    if not half:
        return None
    step = max(1, len(half) // _SAMPLED_WEIGHTS)
    sample = torch.cat([p.detach().float().abs().flatten()[:: max(1, p.numel() // 4096)].cpu() for p in half[::step]])
    return float(sample.median()) * torch.finfo(half[0].dtype).eps / 2


def _half_masters(model: nn.Module) -> list[torch.Tensor]:
    masters = [getattr(module, name) for module, name, _ in trained_weights(model)]
    return [p for p in masters if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)]


def warn_of_slow_dtype(model: nn.Module, args: DistillConfig) -> None:
    """Say so where a processor would train in bf16 without instructions for it."""
    dtype: Any = model.dtype
    warn_of_slow_bf16(args.device, dtype, LOAD_IN_FP32)
    if args.bf16 and dtype != torch.bfloat16:
        warn_of_slow_bf16(args.device, torch.bfloat16, "pass bf16=False to DistillConfig.")


def check_parallelism(accelerator: Accelerator) -> None:
    """Refuse ways to spread a model that the loss cannot follow.

    Raises:
        ConfigError: context, sequence or tensor parallelism.
    """
    parallelism = getattr(accelerator, "parallelism_config", None)
    for name in ("cp", "sp", "tp"):
        if parallelism is not None and getattr(parallelism, f"{name}_enabled", False):
            raise ConfigError(
                f"`parallelism_config` must not split sequences or layers: got {name}_size="
                f"{getattr(parallelism, f'{name}_size', None)}. Use data parallelism or FSDP."
            )


def check_whole(args: DistillConfig, *, is_sharded: bool) -> None:
    """Refuse options that need whole parameters on every device.

    Args:
        args: of the training.
        is_sharded: whether FSDP or DeepSpeed holds the parameters.

    Raises:
        ConfigError: there is one.
    """
    if not is_sharded:
        return
    if args.ema_decay is not None:
        raise ConfigError(
            f"`ema_decay` must be None under FSDP and DeepSpeed: got ema_decay={args.ema_decay!r}. Averages need whole "
            "parameters on every device; use data parallelism (DDP)."
        )
    if args.on_policy_share:
        raise ConfigError(
            f"`on_policy_share` must be 0.0 under FSDP and DeepSpeed: got {args.on_policy_share!r}. The student "
            "samples with whole weights on every device; use data parallelism (DDP)."
        )


def check_tied_tables(model: nn.Module, *, is_sharded: bool) -> None:
    """Refuse a table that the embedding and the head share where parameters are held in parts.

    Args:
        model: the student.
        is_sharded: whether FSDP or ZeRO-3 holds the parameters.

    Raises:
        ConfigError: there is one: each would compute with it, and one part of FSDP cannot see into another.
    """
    tied = [name for name, module in model.named_modules() if isinstance(module, BitDistillerTiedHead)]
    if is_sharded and tied:
        raise ConfigError(
            f"`embedding_bits` must be None under FSDP and ZeRO-3 where embedding and head share a table: got {tied}. "
            "Use data parallelism (DDP) or zero_stage=2, or leave the table as it is."
        )
