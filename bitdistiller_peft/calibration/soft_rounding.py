"""Rounding as a choice that is trained: a soft assignment between the two nearest levels, annealed until it is hard.

The straight-through estimator moves a weight that lies near a boundary back and forth without seeing what the jump
costs. Here a weight shows ``scale * (low + sigmoid(logit / T) - zero_point)`` between its two levels, starting at its
own value with ``T = 1``; as ``T`` falls, it has to decide. In the end the side of its logit is its code.

Sources: the choice between the two nearest levels by a trained variable is AdaRound's (arXiv 2004.10568, section 3.2);
a falling temperature in place of its regulariser follows soft-to-hard quantization (arXiv 1704.00648). Differences:
scales and zero points are trained beside it, and the choice is made for a whole block at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitdistiller_peft.calibration.slots import Slot
from bitdistiller_peft.errors import ConfigError
from bitdistiller_peft.grids import AffineGrid, FineGrid
from bitdistiller_peft.layers import SCALE, ZERO_POINT, companion, packed_params, quantized
from bitdistiller_peft.quantizers import dequantize, store_learned_params, to_groups, zero_of

COLDEST = 0.02
EDGE = 0.01  # a share of 0 or 1 would have no finite logit


def check_soft(slots: Sequence[Slot]) -> None:
    """Refuse students whose scales are not set by themselves, and grids without neighbours at one step.

    Raises:
        ConfigError: there is one; it is named.
    """
    for slot in slots:
        if not isinstance(slot.spec.grid, (AffineGrid, FineGrid)) or not slot.has_learned_scale:
            raise ConfigError(
                f"`rounding` must be 'ste' unless grid is 'int', 'int_sym' or 'int_fine' with learn_scale=True: layer "
                f"{slot.layer_name!r} has grid={slot.spec.grid.name!r}, learn_scale={slot.has_learned_scale}."
            )


class SoftRounding:
    """Lets students show softly rounded weights inside a `with` block.

    Args:
        slots: whose codes are to be chosen; see `check_soft`.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.temperature = 1.0
        self._weights = [(slot, _SoftWeight(slot)) for slot in slots]

    def __enter__(self) -> SoftRounding:
        for slot, soft in self._weights:
            slot.student.__dict__["forward"] = self._showing(soft)
        return self

    def __exit__(self, *error: object) -> None:
        for slot, _ in self._weights:
            slot.student.__dict__.pop("forward", None)

    def _showing(self, soft: _SoftWeight) -> Any:
        return lambda dtype=torch.float32: soft.value(self.temperature).to(dtype)

    def anneal(self, progress: float) -> None:
        """Lower the temperature geometrically, from 1 at progress 0 to `COLDEST` at 1."""
        self.temperature = COLDEST**progress

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """The optimizer's parameter groups of the logits."""
        return [{"params": [soft.logit], "lr": rate} for _, soft in self._weights]

    def harden(self) -> None:
        """Make the choices the students' own: master weights at their levels, so that rounding finds them again."""
        for slot, soft in self._weights:
            soft.harden(slot)


class _SoftWeight:
    """One weight: the code below each of its entries, and a logit for the step up to the next."""

    @torch.no_grad()
    def __init__(self, slot: Slot) -> None:
        self.student, self.shape = slot.student, slot.weight.shape
        _, params = quantized(slot.student, "weight")
        grid: Any = slot.spec.grid
        self.grid = grid
        zero = grid.fixed_zero_point if params.zero_point is None else zero_of(params.zero_point, grid).unsqueeze(-1)
        place = to_groups(slot.weight.float(), slot.spec.group_size) / params.scale.float().unsqueeze(-1) + zero
        self.fixed = None if params.zero_point is not None else float(grid.fixed_zero_point)
        self.low = place.floor().clamp(0, grid.max_code - 1)
        self.logit = nn.Parameter(torch.logit((place - self.low).clamp(EDGE, 1 - EDGE)))

    def value(self, temperature: float) -> Tensor:
        """The weight with a soft choice; differentiable in logits, scale and zero point."""
        scale, zero = (companion(self.student, "weight", suffix) for suffix in (SCALE, ZERO_POINT))
        offset: Any = self.fixed
        if zero is not None:
            whole = zero.float() + (zero.float().round() - zero.float()).detach()  # straight through
            offset = zero_of(whole, self.grid).unsqueeze(-1)
        codes = self.low + torch.sigmoid(self.logit / temperature)
        return (scale.unsqueeze(-1) * (codes - offset)).reshape(self.shape)  # type: ignore[union-attr]

    @torch.no_grad()
    def harden(self, slot: Slot) -> None:
        """Put the master weight on the levels that were chosen."""
        params = store_learned_params(packed_params(slot.student, "weight"), slot.spec)
        codes = (self.low + (self.logit > 0)).reshape(self.shape).to(torch.uint8)
        slot.student.weight.copy_(dequantize(codes, params, slot.spec))
