"""GPTQ over a whole model, front to back: each layer is done on what the finished ones before it make."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bitdistiller_peft.calibration.gptq import Compensated, compensate
from bitdistiller_peft.calibration.options import ClipOptions, GptqOptions
from bitdistiller_peft.calibration.slots import Display, Slot
from bitdistiller_peft.calibration.sweep import Finding, Sweep, mean_factors
from bitdistiller_peft.errors import BitDistillerError, ConfigError, add_location


class GptqSweep(Sweep):
    """A sweep that finds weights and their parameters; holds on to them, and changes nothing until `apply`."""

    is_whole = True
    options: GptqOptions

    def __init__(
        self, options: GptqOptions, num_batches: int, display: Display, on_slot: Callable[[str], None]
    ) -> None:
        super().__init__(options, num_batches, display, on_slot)
        self._compensated: dict[str, Compensated] = {}

    def find(self, slot: Slot, gram: Tensor, note: str) -> Finding:
        """Quantize one slot.

        Args:
            slot: the slot.
            gram: the Gram matrix of all its inputs, ``[..., 1, in, in]``.
            note: what is to be said about it.

        Raises:
            WeightError, ScaleRangeError, ConfigError: see `compensate`; the layer is named.
        """
        if slot.is_table:
            return super().find(slot, gram, note)
        try:
            found = compensate(slot.weight, gram.squeeze(-3), slot.spec, self.options)
        except BitDistillerError as error:
            raise add_location(error, f"layer {slot.layer_name!r}") from None
        self._compensated[slot.name] = found
        low, high = slot.outermost(found.params)
        energy = max(float(found.energy.sum(dtype=torch.float64)), torch.finfo(torch.float32).tiny)
        before, after = (float(e.sum(dtype=torch.float64)) / energy for e in (found.error_before, found.error_after))
        shrink_low, shrink_high = mean_factors(slot, low, high)
        return Finding(low, high, before, after, shrink_low, shrink_high, note=note)

    def apply(self, slots: Sequence[Slot]) -> None:
        """Let the students take over what was found."""
        for slot in slots:
            found = self._compensated.pop(slot.name, None)
            if found is None:
                super().apply([slot])
            else:
                slot.set_quantized(found.weight, found.params, clip_weight=self.options.clip_weights)

    @torch.no_grad()
    def _show(self, slot: Slot, found: Finding) -> None:
        compensated = self._compensated.get(slot.name)
        if compensated is None:
            super()._show(slot, found)
            return
        self.display.show(slot, compensated.values if self.options.inputs == "quantized" else slot.weight)
        # the display drops them when the segment is done; a second copy of all weights would stay
        self._compensated[slot.name] = compensated._replace(values=torch.empty(0))


def check_slots(slots: Sequence[Slot], options: ClipOptions) -> None:
    """Refuse students that a method cannot calibrate.

    Raises:
        ConfigError: there is one; it is named.
    """
    if isinstance(options, GptqOptions):
        _check_learned_scales(slots, options)
    if getattr(options, "clip_search", True):
        for slot in slots:
            if not options.skips(slot.layer_name):
                slot.check_searchable()


def _check_learned_scales(slots: Sequence[Slot], options: GptqOptions) -> None:
    """Refuse students whose scales follow from their weights: they would not show the codes that were chosen.

    Raises:
        ConfigError: there is one; it is named.
    """
    for slot in slots:
        if not slot.has_learned_scale and not options.skips(slot.layer_name):
            raise ConfigError(
                f"`learn_scale` must be True for method='gptq': layer {slot.layer_name!r} takes its scales from its "
                "weights anew at every step, and errors that were made up for would be rounded otherwise. Build the "
                "student with BitDistillerConfig(learn_scale=True), or use method='clip'."
            )
