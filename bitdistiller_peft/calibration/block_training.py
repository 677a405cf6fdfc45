"""The training of one block: what is trained, in which order, and by which steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitdistiller_peft.calibration.capture import find_stages
from bitdistiller_peft.calibration.option_rules import ORDER
from bitdistiller_peft.calibration.options import BlockwiseOptions, names_match
from bitdistiller_peft.calibration.slots import Display, Slot
from bitdistiller_peft.calibration.soft_rounding import SoftRounding
from bitdistiller_peft.errors import BitDistillerError, ConfigError, TrainingError, add_location
from bitdistiller_peft.grids import get_grid
from bitdistiller_peft.layers import SUFFIXES, ZERO_POINT
from bitdistiller_peft.quantizers import QuantSpec

Loss = Callable[[int], Tensor]


def fit(name: str, block: nn.Module, slots: Sequence[Slot], loss: Loss, options: BlockwiseOptions, steps: int) -> None:
    """Train the students of some layers of a block.

    Args:
        name: the block's, for messages.
        block: the block; of its parameters only those of the slots are trained.
        slots: what is trained.
        loss: the loss on a batch, by index, with a graph.
        options: learning rates and epochs.
        steps: batches, hence steps of an epoch.

    Raises:
        TrainingError: a loss is not finite.
    """
    soft = SoftRounding(slots) if options.rounding == "soft" else None
    groups = _parameter_groups(slots, options)
    if soft is not None:
        groups += soft.groups(options.rounding_learning_rate)
    block.requires_grad_(False)
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    device = slots[0].weight.device.type
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=device in ("cpu", "cuda"))
    total = options.epochs * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=total, warmup=options.warmup))
    order = torch.Generator().manual_seed(options.seed)
    with soft or nullcontext():
        for epoch in range(options.epochs):
            for done, index in enumerate(torch.randperm(steps, generator=order).tolist(), epoch * steps):
                if soft is not None:
                    soft.anneal(done / max(1, total - 1))
                value = loss(index)
                _check_finite(float(value.detach()), name)
                optimizer.zero_grad(set_to_none=True)
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    if soft is not None:
        soft.harden()
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = None


def _check_finite(loss: float, name: str) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss must stay finite: it is {loss} in block {name!r}. Lower learning_rate and scale_learning_rate."
        )


def stages_of(slots: Sequence[Slot], options: BlockwiseOptions, run: Callable[[int], object]) -> list[list[Slot]]:
    """Sort the layers of a block into the stages in which they are trained.

    Args:
        slots: the layers.
        options: `stages` says how.
        run: runs the block on a batch, by index; needed for the order in which layers are reached.

    Returns:
        At least one stage; layers that no stage names, or that the text does not reach, are in the last.
    """
    if options.stages is None:
        return [list(slots)]
    if options.stages == ORDER:
        with torch.no_grad():
            found, left = find_stages(slots, run)
        stages = [stage.slots for stage in found]
    else:
        named = [[s for s in slots if names_match(names, s.layer_name)] for names in options.stages]
        # a layer that two stages name is trained in the first
        seen: set[str] = set()
        stages = [[s for s in stage if s.name not in seen and not seen.add(s.name)] for stage in named]  # type: ignore[func-returns-value]
        left = [slot for slot in slots if slot.name not in seen]
    stages = [stage for stage in stages if stage] or [[]]
    stages[-1] = [*stages[-1], *left]
    return stages


@contextmanager
def one_stage(stages: Sequence[Sequence[Slot]], number: int) -> Iterator[None]:
    """Show the layers of later stages not rounded, and those of earlier ones rounded once for all."""
    with Display() as display, torch.no_grad():
        for other, slots in enumerate(stages):
            for slot in slots:
                if other != number:
                    display.show(slot, slot.student() if other < number else slot.weight)
        with torch.enable_grad():
            yield


def check_progressive(slots: Sequence[Slot], widths: Sequence[int]) -> None:
    """Refuse widths that a layer's grid has not.

    Raises:
        ConfigError: there is one; the layer is named.
    """
    for slot in slots:
        for bits in widths:
            try:
                _with_bits(slot.spec, bits)
            except BitDistillerError as error:
                raise add_location(error, f"progressive_bits, layer {slot.layer_name!r}") from None


@contextmanager
def other_bits(slots: Sequence[Slot], bits: int) -> Iterator[list[Slot]]:
    """Quantize layers more finely for a while; afterwards scales start anew from what the weights have become.

    Args:
        slots: layers; those that have as many bits or more are left out.
        bits: code width.

    Yields:
        The layers that are finer now.
    """
    finer = [slot for slot in slots if slot.spec.grid.bits < bits]
    specs = [slot.spec for slot in finer]
    try:
        for slot, spec in zip(finer, specs, strict=True):
            _set_spec(slot, _with_bits(spec, bits))
        yield finer
    finally:
        for slot, spec in zip(finer, specs, strict=True):
            _set_spec(slot, spec)


def _with_bits(spec: QuantSpec, bits: int) -> QuantSpec:
    return replace(spec, grid=get_grid(spec.grid.name, bits), zero_point_range=None)


def _set_spec(slot: Slot, spec: QuantSpec) -> None:
    slot.student.quant_specs = {"weight": spec}  # type: ignore[assignment]
    slot.reset_params()


def check_stages(slots: Sequence[Slot], options: BlockwiseOptions) -> None:
    """Refuse names of stages that fit no layer.

    Raises:
        ConfigError: there is one.
    """
    for names in () if options.stages in (None, ORDER) else options.stages or ():
        for name in names:
            if not any(names_match((name,), slot.layer_name) for slot in slots):
                endings = sorted({slot.layer_name.rpartition(".")[2] for slot in slots})
                raise ConfigError(
                    f"`stages` must name quantized layers: got {name!r}, and the layers end in {endings}."
                )


def _parameter_groups(slots: Sequence[Slot], options: BlockwiseOptions) -> list[dict[str, Any]]:
    """What is trained, with rates that do not depend on how large the weights happen to be."""
    groups: list[dict[str, Any]] = []
    for slot in slots:
        tensors = {suffix: getattr(slot.student, "weight" + suffix, None) for suffix in ("", *SUFFIXES)}
        if options.rounding == "soft":
            del tensors[""]
        for suffix, tensor in tensors.items():
            rate = options.scale_learning_rate if suffix else options.learning_rate
            if isinstance(tensor, nn.Parameter) and rate > 0:
                unit = {"": slot.step_size, ZERO_POINT: lambda: 1.0}.get(suffix, tensor.detach().abs().mean)
                groups.append({"params": [tensor], "lr": rate * float(unit())})
    return groups


def _rate(step: int, *, steps: int, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
