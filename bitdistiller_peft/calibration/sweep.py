"""The clip search over a whole model, front to back: each layer sees what the calibrated ones before it make."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitdistiller_peft.calibration.blocks import BlockRunner, run_model
from bitdistiller_peft.calibration.capture import Stage, capture, find_stages
from bitdistiller_peft.calibration.clip import group_width, search_range
from bitdistiller_peft.calibration.options import ClipOptions
from bitdistiller_peft.calibration.ranks import Share
from bitdistiller_peft.calibration.result import BlockReport, CalibrationResult, LayerReport
from bitdistiller_peft.calibration.slots import Display, Slot
from bitdistiller_peft.calibration.texts import fingerprint

logger = logging.getLogger(__name__)

NO_INPUTS = "no token reached it; kept min-max"
SKIPPED = "skipped"
KEPT = "kept min-max"
MIN_MAX_BITS = 8  # from here on a narrower range costs more than finer steps gain


@dataclass(frozen=True)
class Finding:
    """What the search found for one slot; without a range, it keeps the one it has.

    Attributes:
        low: lower end of each group's range.
        high: upper end.
        error_before: output error of min-max relative to the output, group by group.
        error_after: the same with the range.
        shrink_low: mean of the factors of the minimum.
        shrink_high: mean of the factors of the maximum.
        seconds: time of the search.
        note: what else is to be said.
    """

    low: Tensor | None = None
    high: Tensor | None = None
    error_before: float = float("nan")
    error_after: float = float("nan")
    shrink_low: float = 1.0
    shrink_high: float = 1.0
    seconds: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Segment:
    """A part of the model that can be run alone: its slots, and its forward pass by batch index.

    Attributes:
        name: for messages.
        slots: what is quantized in it.
        run: its forward pass.
        num_batches: batches it can be run on; by default the sweep's.
    """

    name: str
    slots: list[Slot]
    run: Callable[[int], object]
    num_batches: int | None = None


class Sweep:
    """Searches segment after segment and keeps what it finds; changes nothing in the model.

    Args:
        options: how to search.
        num_batches: batches that a segment can be run on.
        display: presents calibrated weights to the layers after them.
        on_slot: called with the name of each slot that is done.

    Attributes:
        share: what this process has of the text; set it where others have the rest.
    """

    is_whole = False  # what a slot is searched on: the Gram matrix of all its inputs, or those of its groups

    def __init__(
        self, options: ClipOptions, num_batches: int, display: Display, on_slot: Callable[[str], None]
    ) -> None:
        self.options, self.num_batches, self.display, self.on_slot = options, num_batches, display, on_slot
        self.share = Share([])
        self.findings: dict[str, Finding] = {}

    def search(self, segment: Segment, *, one_pass: bool = False) -> list[Slot]:
        """Search all slots of a segment.

        Args:
            segment: the segment.
            one_pass: look at all inputs in one pass, nothing of the segment being calibrated yet.

        Returns:
            The slots that no token reached.
        """
        slots = [slot for slot in segment.slots if not self._skip(slot)]
        if self.options.objective == "weight":
            for slot in slots:
                self._search_slot(slot, _identity(slot), "")
            return []
        for slot in slots:
            if slot.is_table:
                self._search_table(slot)
        slots = [slot for slot in slots if not slot.is_table]
        stages, unseen = find_stages(slots, segment.run, is_whole=self.is_whole) if slots else ([], [])
        if one_pass or self.options.order == "block":
            self._search_stages(stages, segment, stop=False)
        else:
            for stage in stages:
                self._search_stages([stage], segment, stop=True)
        # experts in a module list: the first batch may have passed them by
        rest = [Stage([slot], self.is_whole) for slot in unseen]
        self._search_stages(rest, segment, stop=False)
        return [slot for slot in unseen if slot.name not in self.findings]

    def apply(self, slots: Sequence[Slot]) -> None:
        """Set what was found in the students themselves."""
        for slot in slots:
            found = self.findings[slot.name]
            if found.low is not None and found.high is not None:
                slot.set_range(found.low, found.high, clip_weight=self.options.clip_weights)

    def _skip(self, slot: Slot) -> bool:
        skip = self.options.skips(slot.layer_name)
        if skip:
            self._keep(slot, SKIPPED)
        return skip

    def _search_table(self, slot: Slot) -> None:
        """Search an embedding by the error of its rows, which is all that there is: no input multiplies them."""
        if slot.spec.grid.bits < MIN_MAX_BITS and getattr(self.options, "clip_search", True):
            self._search_slot(slot, _identity(slot), "by its rows")
        else:
            self._keep(slot, KEPT)

    def _keep(self, slot: Slot, note: str) -> None:
        self.findings[slot.name] = Finding(note=note)
        self._show(slot, self.findings[slot.name])
        self.on_slot(slot.name)

    @torch.no_grad()
    def _show(self, slot: Slot, found: Finding) -> None:
        """Let the layers behind a slot see it as `options.inputs` says."""
        is_quantized = self.options.inputs == "quantized"
        if found.low is None or found.high is None:
            self.display.show(slot, slot.student() if is_quantized else slot.weight)
        elif is_quantized:
            self.display.show(slot, slot.quantized_in(found.low, found.high))
        else:
            is_clipped = self.options.inputs == "clipped"
            self.display.show(slot, slot.clipped(found.low, found.high) if is_clipped else slot.weight)

    def give_up(self, slots: Sequence[Slot]) -> None:
        """Let slots that no token reached keep what they have."""
        for slot in slots:
            logger.warning("No token of the calibration text reached layer %r; it keeps its range.", slot.layer_name)
            self._keep(slot, NO_INPUTS)

    @torch.no_grad()
    def _search_stages(self, stages: Sequence[Stage], segment: Segment, *, stop: bool) -> None:
        if not stages:
            return
        capture(stages, segment.run, segment.num_batches or self.num_batches, stop=stop, first=self.share.first)
        for stage in stages:
            if self.share.is_part:
                stage.add_up()
            for slot in stage.slots:
                gram, without = stage.gram_of(slot)
                if gram is not None:
                    note = f"{without} of {len(gram)} experts saw no token; kept min-max" if without else ""
                    self._search_slot(slot, gram, note)
            stage.grams.clear()

    def _search_slot(self, slot: Slot, gram: Tensor, note: str) -> None:
        slot.check()
        started = time.perf_counter()
        found = self.find(slot, gram, note)
        self.findings[slot.name] = found
        self._show(slot, found)
        self.findings[slot.name] = replace(found, seconds=time.perf_counter() - started)
        self.on_slot(slot.name)

    def find(self, slot: Slot, gram: Tensor, note: str) -> Finding:
        """Search one slot.

        Args:
            slot: the slot.
            gram: Gram matrices of its inputs, ``[..., in / width, width, width]``.
            note: what is to be said about it.
        """
        found = search_range(
            slot.weight, gram, slot.spec, factors=self.options.factors, clamp_weight=not slot.has_learned_scale
        )
        shrink_low, shrink_high = mean_factors(slot, found.low, found.high)
        energy = max(float(found.energy.sum(dtype=torch.float64)), torch.finfo(torch.float32).tiny)
        return Finding(
            found.low,
            found.high,
            float(found.error_before.sum(dtype=torch.float64)) / energy,
            float(found.error_after.sum(dtype=torch.float64)) / energy,
            shrink_low,
            shrink_high,
            note=note,
        )


def segments(model: nn.Module, slots: list[Slot], batches: Sequence[Tensor], sweep: Sweep) -> Iterator[list[Slot]]:
    """Search a whole model, segment by segment; yields after each one the slots that it has done with."""
    if not sweep.options.needs_text:
        sweep.search(Segment("model", slots, lambda index: None))
        yield slots
        return
    runner = BlockRunner.create(model, [slot.layer for slot in slots], batches[0])
    if runner is None:
        logger.warning("The model cannot be run block by block; all layers are calibrated on one forward pass.")
        whole = Segment("model", slots, lambda index: run_model(model, batches[index]))
        sweep.give_up(sweep.search(whole, one_pass=True))
        yield slots
        return
    by_block, outside = sort_by_block(runner.names, slots)
    outside = sweep.search(Segment("before the blocks", outside, lambda index: runner.run_before(batches[index])))
    hidden = runner.record(batches)
    for number in blocks_to_visit(by_block, outside):
        block = Segment(runner.names[number], by_block[number], partial(run_block, runner, number, hidden))
        sweep.give_up(sweep.search(block))
        with torch.no_grad():
            for index, states in enumerate(hidden):
                hidden[index] = runner.run(number, index, states)
        yield by_block[number]
    after = Segment("after the blocks", outside, lambda index: runner.run_after(batches[index], hidden[index]))
    sweep.give_up(sweep.search(after))
    yield outside


def result_of(
    sweep: Sweep, specs: Mapping[str, dict[str, Any]], blocks: list[BlockReport], method: str, windows: Tensor
) -> CalibrationResult:
    """What a sweep has found, for the user.

    Args:
        sweep: it is over.
        specs: how each slot is quantized, by name.
        blocks: reports of trained blocks.
        method: its name.
        windows: token ids ``[samples, seq_len]``.
    """
    findings = sweep.findings
    reports = [
        LayerReport(name, f.error_before, f.error_after, f.shrink_low, f.shrink_high, f.seconds, f.note)
        for name, f in findings.items()
    ]
    ranges = {n: (f.low, f.high) for n, f in findings.items() if f.low is not None and f.high is not None}
    data = {"num_samples": windows.shape[0], "seq_len": windows.shape[1], "tokens_sha256": fingerprint(windows)}
    used = {name: specs[name] for name in ranges}
    return CalibrationResult(method, reports, ranges, used, data, blocks, sweep.options.clip_weights)


def run_block(runner: BlockRunner, number: int, hidden: list[Tensor], index: int) -> Tensor:
    """Run one block on one of the kept hidden states.

    Args:
        runner: of the model.
        number: which block.
        hidden: the hidden states that enter it, by batch.
        index: which batch.
    """
    return runner.run(number, index, hidden[index])


def sort_by_block(names: Sequence[str], slots: Sequence[Slot]) -> tuple[list[list[Slot]], list[Slot]]:
    """The slots inside each of the named blocks, and those outside of all."""
    by_block = [[slot for slot in slots if slot.name.startswith(f"{name}.")] for name in names]
    inside = {slot.name for block in by_block for slot in block}
    return by_block, [slot for slot in slots if slot.name not in inside]


def blocks_to_visit(by_block: Sequence[Sequence[Slot]], outside: Sequence[Slot]) -> range:
    """The blocks up to the last one with slots, or all if there are slots behind them."""
    last = max((number for number, slots in enumerate(by_block) if slots), default=-1)
    return range(len(by_block) if outside else last + 1)


def _identity(slot: Slot) -> Tensor:
    *batch, _, in_features = slot.weight.shape
    width = group_width(slot.spec, in_features)
    eye = torch.eye(width, device=slot.weight.device)
    return eye.expand(*batch, in_features // width, width, width)


def mean_factors(slot: Slot, low: Tensor, high: Tensor) -> tuple[float, float]:
    """How far both ends moved, on average over the groups that have weights on that side."""
    means = []
    for chosen, whole in zip((low, high), slot.min_max(), strict=True):
        used = whole != 0
        means.append(float((chosen[used] / whole[used]).mean()) if bool(used.any()) else 1.0)
    return means[0], means[1]
