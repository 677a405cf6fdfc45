"""Activation-aware scaling: inputs that are large get finer weights, and what is multiplied there is divided before.

Column ``j`` of a weight is multiplied by ``s_j = m_j ** alpha``, with the mean magnitude ``m_j`` of input ``j``, and
input ``j`` is divided by it. In full precision nothing changes. Quantized, a column with a large scale takes a larger
part of its group's range, so its rounding errors, which large inputs would multiply, get smaller. For every set of
layers that read the same tensor, the exponent is the one with the smallest output error, measured with the Gram matrix
of the inputs; 0, which changes nothing, is among those tried.

Scales live in the student alone: in its master weights, and in tensors of its own that make the inputs (see `folding`).
So the teacher stays what it is to the last bit, and saving, loading and packing know nothing of any of this.

Source: AWQ (arXiv 2306.00978), section 3.2; the normalisation ``s / sqrt(max s * min s)`` and the exponents are those
of its released code. Differences: errors are those of each layer's own output, relative to it, not of the module around
it; inputs that are always zero are not scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from bitdistiller_peft.calibration.blocks import BlockRunner
from bitdistiller_peft.calibration.capture import Stage, capture, find_stages, is_fused
from bitdistiller_peft.calibration.folding import Fold, find_fold
from bitdistiller_peft.calibration.gptq import plain_values, quadratic
from bitdistiller_peft.calibration.options import AwqOptions
from bitdistiller_peft.calibration.rotation import head_width, rotate_heads
from bitdistiller_peft.calibration.slots import Display, Slot
from bitdistiller_peft.calibration.sweep import SKIPPED, Finding, Sweep, blocks_to_visit, segments, sort_by_block
from bitdistiller_peft.errors import BitDistillerError, StateError, add_location

PROBE_TOKENS = 32


@dataclass(frozen=True)
class Scaling:
    """The scales of some layers that read the same tensor.

    Attributes:
        slots: the layers.
        scale: one for each input; `None` where nothing is scaled.
        fold: what takes the scales back.
        findings: errors and a note for each slot, by name.
    """

    slots: list[Slot]
    scale: Tensor | None
    fold: Fold | None
    findings: dict[str, Finding]


class AwqSweep(Sweep):
    """Finds scales on the whole model in full precision, then sets them, then searches ranges as any sweep does."""

    options: AwqOptions

    def __init__(self, options: AwqOptions, num_batches: int, display: Display, on_slot: Callable[[str], None]) -> None:
        super().__init__(options, num_batches, display, on_slot)
        self._rotated: set[str] = set()

    def run(self, model: nn.Module, slots: list[Slot], batches: Sequence[Tensor]) -> None:
        """Calibrate the student; on any exception it is put back.

        Args:
            model: the transformers model with overlays in it, in eval mode.
            slots: the quantized parameters.
            batches: token ids.

        Raises:
            StateError: the model cannot be run block by block.
            WeightError, ScaleRangeError: a weight cannot be quantized; the layer is named.
        """
        rotated = [(slot.weight, slot.weight.clone()) for slot in slots] if self.options.rotate_heads else []
        try:
            self._scale(model, slots, batches)
        except BaseException:
            _put_back(rotated)
            raise

    def _scale(self, model: nn.Module, slots: list[Slot], batches: Sequence[Tensor]) -> None:
        scalings = self._find(model, slots, batches)
        own = [tensor for scaling in scalings if scaling.fold is not None for tensor in scaling.fold.tensors]
        own += [tensor for slot in slots for tensor in slot.trained_tensors().values()]
        kept = [(tensor, tensor.clone()) for tensor in {tensor.data_ptr(): tensor for tensor in own}.values()]
        try:
            self._apply_scalings(scalings)
            self._search_ranges(model, slots, batches, {n: f for s in scalings for n, f in s.findings.items()})
        except BaseException:
            _put_back(kept)
            raise
        for name in self._rotated & self.findings.keys():
            found = self.findings[name]
            self.findings[name] = replace(found, note="; ".join(filter(None, (found.note, "rotated head by head"))))

    @torch.no_grad()
    def _find(self, model: nn.Module, slots: list[Slot], batches: Sequence[Tensor]) -> list[Scaling]:
        runner = BlockRunner.create(model, [slot.layer for slot in slots], batches[0])
        if runner is None:
            raise StateError(
                f"the model must run block by block: {type(model).__name__} does not. Use method='gptq' or 'clip', "
                "which need not."
            )
        found: list[Scaling] = []
        by_block, outside = sort_by_block(runner.names, slots)
        for slot in outside:
            found.append(_unscaled([slot], "not scaled: outside of the blocks"))
            self.on_slot(slot.name)
        for slot in slots:
            self.display.show(slot, slot.weight)
        hidden = runner.record([*batches, batches[0][:1, :PROBE_TOKENS]])
        for number in blocks_to_visit(by_block, []):
            found += self._find_in_block(runner, number, by_block[number], hidden)
            for index, states in enumerate(hidden):
                hidden[index] = runner.run(number, index, states)
        self.display.clear()
        return found

    def _find_in_block(
        self, runner: BlockRunner, number: int, slots: list[Slot], hidden: list[Tensor]
    ) -> list[Scaling]:
        def run(index: int) -> Tensor:
            return runner.run(number, index, hidden[index])

        if self.options.rotate_heads:
            free = [slot for slot in slots if not self.options.skips(slot.layer_name)]
            turned = rotate_heads(free, head_width(runner.model), partial(run, len(hidden) - 1))
            self._rotated |= {slot.name for slot in turned}
        skipped = [slot for slot in slots if is_fused(slot)]
        stages, unseen = find_stages([slot for slot in slots if not is_fused(slot)], run, is_whole=True)
        capture(stages, run, len(hidden) - 1, stop=False)
        found = [_unscaled([slot], "not scaled: experts have inputs each of their own") for slot in skipped]
        found += [_unscaled([slot], "not scaled: no token reached it") for slot in unseen]
        for stage in stages:
            fold = find_fold(runner.blocks[number], stage.slots, slots, partial(run, len(hidden) - 1))
            found.append(self._search_scale(stage, fold))
            stage.grams.clear()
        for slot in slots:
            self.on_slot(slot.name)
        return found

    def _search_scale(self, stage: Stage, fold: Fold | None) -> Scaling:
        slots = stage.slots
        gram, magnitude = stage.gram_of(slots[0])[0], stage.magnitude()
        if magnitude is not None and self.options.scales == "sinkhorn":
            magnitude = 1 / column_spread([slot.weight for slot in slots])
        if gram is None or magnitude is None:
            return _unscaled(slots, "not scaled: no token reached it")
        gram = gram.squeeze(0)
        errors = _errors(slots, gram, None)
        reason = _obstacle(slots, fold, self.options)
        if reason or fold is None:
            return Scaling(slots, None, None, {n: Finding(None, None, e, e, note=reason) for n, e in errors.items()})
        best: tuple[float, float, Tensor | None, dict[str, float]] = (sum(errors.values()), 0.0, None, errors)
        for alpha in self.options.alphas[1:]:
            scale = input_scale(magnitude, alpha)
            tried = _errors(slots, gram, scale)
            if sum(tried.values()) < best[0]:
                best = (sum(tried.values()), alpha, scale, tried)
        note = (
            f"alpha={best[1]:g}, taken back in {fold.name!r}" if best[2] is not None else "not scaled: alpha=0 is best"
        )
        findings = {n: Finding(None, None, errors[n], e, note=note) for n, e in best[3].items()}
        return Scaling(slots, best[2], fold, findings)

    @torch.no_grad()
    def _apply_scalings(self, scalings: Sequence[Scaling]) -> None:
        touched: dict[str, Slot] = {}
        for scaling in scalings:
            if scaling.scale is None or scaling.fold is None:
                continue
            scaling.fold.divide(scaling.scale)
            for slot in scaling.slots:
                slot.student.weight.mul_(scaling.scale)
        for scaling in scalings:
            touched.update({slot.name: slot for slot in scaling.slots})  # rotated ones are among them
        for slot in touched.values():
            slot.reset_params()

    def _search_ranges(
        self, model: nn.Module, slots: list[Slot], batches: Sequence[Tensor], scaled: dict[str, Finding]
    ) -> None:
        if not self.options.clip_search:
            self.findings = {slot.name: _with_ends(scaled[slot.name], slot) for slot in slots}
            return
        for _ in segments(model, slots, batches, self):
            self.display.clear()
        self.apply(slots)
        for name, found in self.findings.items():
            notes = [note for note in (scaled[name].note, found.note) if note]
            before, after = scaled[name].error_before, scaled[name].error_after
            self.findings[name] = replace(found, error_before=before, error_after=after, note="; ".join(notes))


def input_scale(magnitude: Tensor, alpha: float) -> Tensor:
    """The scales of inputs of some mean magnitudes ``[in]``, normalised so that largest and smallest multiply to 1."""
    is_used = magnitude > 0
    if not bool(is_used.any()):
        return torch.ones_like(magnitude)
    scale = torch.where(is_used, magnitude, 1.0).pow(alpha).clamp(min=1e-4)
    used = scale[is_used]
    return torch.where(is_used, scale / (used.amax() * used.amin()).sqrt(), 1.0)


def column_spread(weights: Sequence[Tensor], steps: int = 16) -> Tensor:
    """How far the columns of some weights spread, once rows and columns are balanced in turn: fp32 ``[in]``.

    Dividing columns by it evens out what a group of weights has to hold, whatever the activations.

    Source: the Sinkhorn-like normalisation of SINQ (arXiv 2509.22944), section 2. Difference: plain alternation.

    Args:
        weights: of layers that read the same inputs, ``[out, in]``.
        steps: rounds.
    """
    matrix = torch.cat([weight.float() for weight in weights])
    least = torch.finfo(torch.float32).tiny
    columns = torch.ones(matrix.shape[1], device=matrix.device)
    for _ in range(steps):
        rows = (matrix / columns).std(1, keepdim=True, correction=0).clamp(min=least)
        columns = (matrix / rows).std(0, correction=0)
        columns = torch.where(columns > 0, columns, 1.0)
        columns = columns / columns.log().mean().exp()
    return columns


def _put_back(kept: Sequence[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, copy in kept:
            tensor.copy_(copy)


def _errors(slots: Sequence[Slot], gram: Tensor, scale: Tensor | None) -> dict[str, float]:
    """Output error of each slot relative to its output, with its columns scaled before it is rounded."""
    errors = {}
    for slot in slots:
        weight = slot.weight.float()
        try:
            if scale is None:
                moved = plain_values(weight, slot.spec) - weight
            else:
                moved = plain_values(weight * scale, slot.spec) / scale - weight
        except BitDistillerError as error:
            raise add_location(error, f"layer {slot.layer_name!r}") from None
        energy = float(quadratic(weight, gram).sum(dtype=torch.float64))
        error_sum = float(quadratic(moved, gram).sum(dtype=torch.float64))
        errors[slot.name] = error_sum / max(energy, torch.finfo(torch.float32).tiny)
    return errors


def _obstacle(slots: Sequence[Slot], fold: Fold | None, options: AwqOptions) -> str:
    """Why these layers cannot be scaled; empty if they can."""
    if any(options.skips(slot.layer_name) for slot in slots):
        return f"not scaled: {SKIPPED}"
    if fold is None:
        return "not scaled: nothing before it can take a scale back"
    if not fold.is_own:
        return f"not scaled: {fold.name!r} is the teacher's too; train_other='norms' gives the student its own"
    return ""


def _unscaled(slots: list[Slot], note: str) -> Scaling:
    return Scaling(slots, None, None, {slot.name: Finding(note=note) for slot in slots})


def _with_ends(found: Finding, slot: Slot) -> Finding:
    low, high = slot.min_max()
    return replace(found, low=low, high=high)
