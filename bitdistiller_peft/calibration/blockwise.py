"""Block-wise reconstruction: each decoder block is trained, alone, to do what the full-precision block does.

A block is small enough to train on a few thousand tokens, and what it must produce is known exactly, so this brings a
2-bit student most of the way before the first step of distillation. Block k receives what the finished student blocks
before it produce, hence learns to make up for their errors; its target is the output of the full-precision block, by
default on full-precision inputs.

Source: the idea of training weights and quantization parameters together, block by block, is EfficientQAT's Block-AP
(arXiv 2407.11062), section 3.2. Differences: the clip search comes first, the targets come from the full-precision
prefix, outputs may be compared behind the next blocks as well, and are compared after normalisation. The last matters
most with few tokens: one token's huge activations, which a decoder makes at the first position to rest its attention
on, else decide the whole loss.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitdistiller_peft.calibration.block_training import (
    check_progressive,
    check_stages,
    fit,
    one_stage,
    other_bits,
    stages_of,
)
from bitdistiller_peft.calibration.blocks import BlockRunner
from bitdistiller_peft.calibration.look_ahead import LookAhead
from bitdistiller_peft.calibration.options import BlockwiseOptions
from bitdistiller_peft.calibration.progress import Progress
from bitdistiller_peft.calibration.result import BlockReport
from bitdistiller_peft.calibration.slots import Display, Slot
from bitdistiller_peft.calibration.soft_rounding import check_soft
from bitdistiller_peft.calibration.sweep import Finding, Segment, Sweep, blocks_to_visit, sort_by_block
from bitdistiller_peft.errors import ConfigError, StateError
from bitdistiller_peft.kernels import multiplies_bf16
from bitdistiller_peft.tuner import full_precision


def reconstruct(
    model: nn.Module, slots: list[Slot], batches: Sequence[Tensor], sweep: Sweep, progress: Progress
) -> Iterator[BlockReport]:
    """Calibrate and train block after block, in place.

    Args:
        model: the transformers model with overlays in it, in eval mode.
        slots: the quantized parameters.
        batches: token ids; one batch is one training step.
        sweep: the clip search, with the options of the training.
        progress: the blocks that an earlier call finished, and where to keep those of this one.

    Yields:
        A report for each block.

    Raises:
        StateError: the model cannot be run block by block.
        ConfigError: a stage, width or kind of rounding that does not suit the students.
        TrainingError: a loss is not finite; the block is named and is as it was.
    """
    options: Any = sweep.options  # those of the training are among them
    check_stages(slots, options)
    check_progressive(slots, options.progressive_bits)
    if options.rounding == "soft":
        check_soft(slots)
    runner = BlockRunner.create(model, [slot.layer for slot in slots], batches[0])
    if runner is None:
        raise StateError(
            f"the model must run block by block: {type(model).__name__} does not. Use method='clip', which needs not."
        )
    by_block, outside = sort_by_block(runner.names, slots)
    _check_outside(outside, options)
    progress.check_untouched(outside)
    before = Segment("before the blocks", outside, lambda index: runner.run_before(batches[index]))
    left = sweep.search(before)
    sweep.apply([slot for slot in outside if slot not in left])
    with full_precision(model):
        targets = runner.record(batches)
    hidden = runner.record(batches)
    for number in blocks_to_visit(by_block, left):
        work = _Block(runner, number, by_block[number], hidden, targets, options.look_ahead)
        report = progress.restore(work.name, work.slots, sweep)
        if report is None and work.slots:
            report = work.reconstruct(sweep, options)
            progress.keep(report, work.slots, sweep)
        else:
            work.pass_by(options)
        if report is not None:
            yield report
    # the head, if it is quantized, by the clip search alone
    after = Segment("after the blocks", left, lambda index: runner.run_after(batches[index], hidden[index]))
    sweep.give_up(sweep.search(after))
    sweep.apply(left)


def _check_outside(outside: Sequence[Slot], options: BlockwiseOptions) -> None:
    """Refuse, before anything is changed, what is in no block and cannot be searched: nothing else is done there."""
    for slot in outside:
        if options.skips(slot.layer_name):
            continue
        try:
            slot.check_searchable()
        except ConfigError as error:
            raise ConfigError(
                f"{error} This layer is in no decoder block, where method='blockwise' only searches ranges, also with "
                f"clip_search=False: pass skip=({slot.layer_name.rpartition('.')[2]!r},)."
            ) from None


class _Block:
    """One block at work. `hidden` and `targets` are moved on in place, from what enters the block to what leaves it."""

    def __init__(
        self,
        runner: BlockRunner,
        number: int,
        slots: list[Slot],
        hidden: list[Tensor],
        targets: list[Tensor],
        look_ahead: int,
    ) -> None:
        self.model, self.block, self.name, self.slots = runner.model, runner.blocks[number], runner.names[number], slots
        self.hidden, self.targets = hidden, targets
        self._runner, self._number, self._ahead = runner, number, LookAhead(runner, number, look_ahead)
        self._device = hidden[0].device  # where the block is run; hidden states stay where they are
        self._sample = range(0, len(hidden), max(1, len(hidden) // 8))  # enough to tell the error

    def reconstruct(self, sweep: Sweep, options: BlockwiseOptions) -> BlockReport:
        """Clip, train, and move on; on any exception the student is put back."""
        with self._moved(options.device, sweep, *self._ahead.blocks):
            return self._reconstruct(sweep, options)

    def _reconstruct(self, sweep: Sweep, options: BlockwiseOptions) -> BlockReport:
        started = time.perf_counter()
        self._make_targets(options.targets)
        kept = [(tensor, tensor.clone()) for slot in self.slots for tensor in slot.trained_tensors().values()]
        try:
            before = self._error(options)
            self._train_finer(options)
            self._clip(sweep, options)
            clipped = self._error(options)
            self._train(options)
        except BaseException:
            with torch.no_grad():
                for tensor, copy in kept:
                    tensor.copy_(copy)
            raise
        after = self._move_on(options)
        return BlockReport(self.name, before, clipped, after, time.perf_counter() - started)

    def pass_by(self, options: BlockwiseOptions) -> None:
        """Move on through a block without quantized parameters, or one that is finished."""
        with self._moved(options.device, None):
            self._make_targets(options.targets)
            self._move_on(options)

    @contextmanager
    def _moved(self, device: str | None, sweep: Sweep | None, *behind: nn.Module) -> Iterator[None]:
        """Have the block, and what the search finds in it, on another device for a while, and blocks behind it."""
        home = next(self.block.parameters()).device
        if device is None or home == torch.device(device):
            yield
            return
        self._device = torch.device(device)
        for block in (self.block, *behind):
            block.to(self._device)
        try:
            yield
        finally:
            for block in (self.block, *behind):
                block.to(home)
            for slot in self.slots:
                _bring_home(sweep, slot.name, home)

    def _run(self, index: int, states: Tensor) -> Tensor:
        return self._runner.run(self._number, index, states.to(self._device))

    @torch.no_grad()
    def _make_targets(self, source: str) -> None:
        entering = self.targets if source == "full" else self.hidden
        with full_precision(self.model), _fast_dtype(self.hidden[0], self._device):
            for index, states in enumerate(entering):
                self.targets[index] = self._run(index, states).to(states.device)

    @torch.no_grad()
    def _error(self, options: BlockwiseOptions) -> float:
        """Squared error of the block's output relative to its target, on some of the batches, as the loss sees it."""
        found = _RelativeError()
        with self._quantized_once(), _fast_dtype(self.hidden[0], self._device):
            for index in self._sample:
                found.add(*self._compared(self._run(index, self.hidden[index]), index, options))
        return found.ratio()

    def _clip(self, sweep: Sweep, options: BlockwiseOptions) -> None:
        if not options.clip_search:
            sweep.findings.update({slot.name: Finding(note="not searched") for slot in self.slots})
            for slot in self.slots:
                sweep.on_slot(slot.name)
            return
        wanted = math.ceil(options.clip_tokens / self.hidden[0][..., 0].numel())
        some = range(0, len(self.hidden), max(1, len(self.hidden) // wanted))
        segment = Segment(
            self.name, self.slots, lambda index: self._run(some[index], self.hidden[some[index]]), len(some)
        )
        sweep.give_up(sweep.search(segment))
        sweep.display.clear()
        sweep.apply(self.slots)

    def _train(self, options: BlockwiseOptions) -> None:
        stages = stages_of(self.slots, options, lambda index: self._run(index, self.hidden[index]))
        for number, slots in enumerate(stages):
            with one_stage(stages, number):
                self._fit(slots, options)

    def _fit(self, slots: Sequence[Slot], options: BlockwiseOptions) -> None:
        with self._ahead.in_full_precision():
            fit(self.name, self.block, slots, partial(self._loss, options=options), options, len(self.hidden))

    def _train_finer(self, options: BlockwiseOptions) -> None:
        """Train at other widths first, from fine to coarse, so that each start is near its end."""
        for bits in options.progressive_bits:
            with other_bits(self.slots, bits) as finer:
                if finer:
                    self._fit(finer, replace(options, rounding="ste"))

    def _loss(self, index: int, options: BlockwiseOptions) -> Tensor:
        with torch.enable_grad():
            with _fast_dtype(self.hidden[0], self._device):
                output = self._run(index, self.hidden[index])
            loss = F.mse_loss(*self._compared(output, index, options))
            if not self._ahead.blocks:
                return loss
            with _fast_dtype(self.hidden[0], self._device):
                later = self._ahead(index, output)
                target = self._ahead.target(index, self.targets[index], self._device)
            return loss + F.mse_loss(*_as_compared(later, target, options))

    def _compared(self, output: Tensor, index: int, options: BlockwiseOptions) -> tuple[Tensor, Tensor]:
        return _as_compared(output, self.targets[index].to(output.device), options)

    @torch.no_grad()
    def _move_on(self, options: BlockwiseOptions) -> float:
        """Let the hidden states pass; also returns the error, as `_error` does, of a block that is finished."""
        found = _RelativeError()
        with self._quantized_once(), _fast_dtype(self.hidden[0], self._device):
            for index, states in enumerate(self.hidden):
                output = self._run(index, states)
                if index in self._sample:
                    found.add(*self._compared(output, index, options))
                self.hidden[index] = output.to(states.device)
        return found.ratio()

    @contextmanager
    def _quantized_once(self) -> Iterator[None]:
        """Quantize each weight once, not once a batch."""
        with Display() as display, torch.no_grad():
            for slot in self.slots:
                display.show(slot, slot.student())
            yield


class _RelativeError:
    """An error relative to what it is an error of, batch by batch."""

    def __init__(self) -> None:
        self.error = self.energy = 0.0

    def add(self, output: Tensor, target: Tensor) -> None:
        self.error += float(F.mse_loss(output, target, reduction="sum"))
        self.energy += float(target.square().sum())

    def ratio(self) -> float:
        return self.error / max(self.energy, torch.finfo(torch.float32).tiny)


def _bring_home(sweep: Sweep | None, name: str, home: torch.device) -> None:
    found = None if sweep is None else sweep.findings.get(name)
    if sweep is not None and found is not None and found.low is not None and found.high is not None:
        sweep.findings[name] = replace(found, low=found.low.to(home), high=found.high.to(home))


def _as_compared(output: Tensor, target: Tensor, options: BlockwiseOptions) -> tuple[Tensor, Tensor]:
    """Output and target as they are to be compared, in fp32."""
    output, target = output.float(), target.float()
    return (output, target) if options.loss == "mse" else (_normalized(output), _normalized(target))


def _normalized(states: Tensor) -> Tensor:
    """Hidden states ``[..., width]`` divided by their root mean square, token by token."""
    return F.rms_norm(states, states.shape[-1:], eps=1e-6)


def _fast_dtype(like: Tensor, device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast where the machine multiplies bf16 natively and the model is fp32."""
    is_fast = like.dtype == torch.float32 and multiplies_bf16(device)
    return torch.autocast(device.type, torch.bfloat16) if is_fast else nullcontext()
