"""Widths for groups of layers, so that the file fits and the costs are least."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from bitdistiller_peft.calibration.knapsack import choose
from bitdistiller_peft.hub.file_size import packed_file_bytes
from bitdistiller_peft.hub.modules import weight_shape
from bitdistiller_peft.layers import packed_bytes
from bitdistiller_peft.quantizers import QuantSpec


@dataclass(frozen=True)
class Problem:
    """What is known when widths are to be chosen.

    Attributes:
        model: the full-precision model.
        specs: how a layer is quantized, by width and name.
        costs: what each width of a group of layers (names joined by commas) costs.
        norms: layers that get a `SubLN`.
    """

    model: nn.Module
    specs: Mapping[int, Mapping[str, QuantSpec]]
    costs: Mapping[str, Mapping[int, float]]
    norms: Collection[str] = ()

    def file_bytes(self, bits: Mapping[str, int]) -> int:
        """The size of the file with these widths."""
        return packed_file_bytes(
            self.model, {name: self.specs[width][name] for name, width in bits.items()}, self.norms
        )

    def cost(self, bits: Mapping[str, int]) -> float:
        """The sum of what these widths cost."""
        return sum(prices[bits[group.split(",")[0]]] for group, prices in self.costs.items())

    def smallest(self) -> dict[str, int]:
        """The widths of the smallest file."""
        return self._widths_of({group: min(prices) for group, prices in self.costs.items()})

    def solve(self, limit: int) -> dict[str, int] | None:
        """The widths that cost least and whose file has at most `limit` bytes, or `None` where none has."""
        options = {group: sorted(prices) for group, prices in self.costs.items()}
        sizes = [[self._group_bytes(group, bits) for bits in options[group]] for group in options]
        costs = [[self.costs[group][bits] for bits in options[group]] for group in options]
        room = limit - self.file_bytes(self.smallest()) + sum(row[0] for row in sizes)
        while (picked := choose(sizes, costs, room)) is not None:
            pairs = zip(options, picked, strict=True)
            bits = self._widths_of({group: options[group][index] for group, index in pairs})
            excess = self.file_bytes(bits) - limit
            if excess <= 0:
                return bits
            room -= excess  # a few digits more in the header
        return None

    def _widths_of(self, groups: Mapping[str, int]) -> dict[str, int]:
        return {name: bits for group, bits in groups.items() for name in group.split(",")}

    def _group_bytes(self, group: str, bits: int) -> int:
        shapes = {name: weight_shape(self.model.get_submodule(name)) for name in group.split(",")}
        return sum(packed_bytes(self.specs[bits][name], shape) for name, shape in shapes.items())
